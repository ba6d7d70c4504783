"""Tokenizers: bytes, a Hugging Face tokenizer.json, tiktoken.

The text ``<|endoftext|>`` inside a document is encoded as ordinary characters, never as a special
token: no document can forge its own end.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_mlra.command_line.foreign_text import read_json
from megatron_mlra.command_line.plain_file import sha256
from megatron_mlra.data.errors import InputError, first_line, require
from megatron_mlra.data.library_tokenizer import check_growth, ordinary_errors

TOKENIZER_TYPES = ("byte", "hf", "tiktoken")
TOKENIZER_BYTES = 256 << 20
"""Most bytes of a tokenizer's file; that of 256,000 tokens has 33 MB."""


@dataclass(frozen=True)
class TokenizerSpec:
    """Names a tokenizer. Worker processes are sent this and build the tokenizer themselves."""

    type: str
    """One of ``TOKENIZER_TYPES``."""
    model: str | None = None
    """hf: tokenizer.json or its folder; tiktoken: an encoding's name or a ranks file."""
    eod_token: str | None = None
    """hf: the token that ends a document; default: eos_token of tokenizer_config.json."""
    eod_id: int | None = None
    """tiktoken ranks file: the id that ends a document; default: one above the largest rank."""
    pattern: str | None = None
    """tiktoken ranks file: the regular expression that splits words; default: GPT-2's."""


class Tokenizer(Protocol):
    """The interface of all tokenizers."""

    vocab_size: int
    eod: int
    """Id of the end of a document."""

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, without an end-of-document id."""

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of ids."""

    def describe(self) -> dict[str, Any]:
        """What identifies the tokenizer, for the metadata file."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, and 256 for the end of a document."""

    vocab_size = 257
    eod = 256

    def tokenize(self, text: str) -> list[int]:
        """The UTF-8 bytes of a text.

        Raises:
            UnicodeEncodeError: the text holds a lone surrogate.
        """
        return list(text.encode("utf-8"))

    def tokenize_array(self, text: str) -> np.ndarray:
        """``tokenize`` as an array, uint8 [bytes]."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of ids. EOD is left out; bytes that are not UTF-8 and ids above 256 (rows that
        pad a vocabulary) become U+FFFD."""
        never_utf8 = 0xFF
        data = bytes(i if 0 <= i < 256 else never_utf8 for i in ids if i != self.eod)
        return data.decode("utf-8", errors="replace")

    def describe(self) -> dict[str, Any]:
        """The type alone: there is no model file."""
        return {"type": "byte"}


class HFTokenizer:
    """A Hugging Face ``tokenizer.json``, read by the ``tokenizers`` package."""

    def __init__(self, model: str, eod_token: str | None = None) -> None:
        """Load ``model``, a tokenizer.json or the folder that holds it.

        Raises:
            InputError: the file is missing or no tokenizer, or no end-of-document token is known.
        """
        self._file = _tokenizer_json(Path(model))
        self._tokenizer = read_tokenizer_json(self._file)
        # A saved tokenizer may be set to truncate or pad texts; documents must stay whole.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocab:
            raise InputError(f"{self._file} has an empty vocabulary")
        self.vocab_size = max(vocab.values()) + 1
        token = eod_token or _eos_token(self._file.with_name("tokenizer_config.json"))
        if token is None:
            raise InputError(
                f"{self._file} does not say which token ends a document: write"
                ' {"eos_token": ...} into tokenizer_config.json beside it, or to mlra preprocess'
                " pass --eod-token"
            )
        if token not in vocab:
            raise InputError(f"the end-of-document token {token!r} is not in {self._file}")
        self._eod_token, self.eod = token, vocab[token]

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, without special tokens.

        Raises:
            InputError: the tokenizer fails on this text.
        """
        with ordinary_errors(f"{self._file} fails on a text"):
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens left out.

        Raises:
            InputError: the tokenizer fails on these ids.
        """
        with ordinary_errors(f"{self._file} fails on ids"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def describe(self) -> dict[str, Any]:
        """Type, file, the file's SHA-256, and the token that ends a document."""
        return {
            "type": "hf",
            # Absolute: programs in other working directories read the data.
            "model": str(self._file.absolute()),
            "sha256": sha256(self._file),
            "eod_token": self._eod_token,
        }


class TiktokenTokenizer:
    """A tiktoken encoding, by name (which tiktoken downloads) or from a local ranks file."""

    def __init__(self, model: str, eod_id: int | None = None, pattern: str | None = None) -> None:
        """Load the encoding called ``model``, or the ranks file at that path.

        Raises:
            InputError: the name is unknown, the download fails, or the ranks file or the pattern is
                wrong.
        """
        library = require("tiktoken", "the tiktoken tokenizer")
        self._file = Path(model) if Path(model).exists() else None
        if self._file is not None and not self._file.is_file():
            _refuse_pipe(self._file)
        if self._file is None and ("/" in model or model.endswith(".tiktoken")):
            raise InputError(f"tiktoken ranks file {model} does not exist")
        if self._file is None:
            if eod_id is not None or pattern is not None:
                raise InputError(
                    f"--eod-id and --tiktoken-pattern are for ranks files: {model} has its own"
                )
            self._encoding = _named_encoding(library, model)
        else:
            self._encoding = _ranks_encoding(library, self._file, eod_id, pattern)
        self._name = model
        self.vocab_size = self._encoding.n_vocab
        self.eod = self._encoding.eot_token

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, without special tokens.

        Raises:
            InputError: the pattern fails on this text.
        """
        with ordinary_errors(f"tiktoken {self._name} fails on a text"):
            return self._encoding.encode_ordinary(text)

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of ids. EOD is left out; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode([i for i in ids if i != self.eod], errors="replace")

    def describe(self) -> dict[str, Any]:
        """Type, name or file, word pattern, and the SHA-256 of a ranks file."""
        described = {"type": "tiktoken", "model": self._name, "pattern": self._encoding._pat_str}
        if self._file is not None:
            described["sha256"] = sha256(self._file)
        return described


def build_tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """Build the tokenizer that ``spec`` names.

    Raises:
        InputError: the type is unknown or does not take an option, or the model is wrong.
    """
    if spec.type not in TOKENIZER_TYPES:
        raise InputError(f"unknown tokenizer {spec.type!r}: use {', '.join(TOKENIZER_TYPES)}")
    if (spec.model is None) != (spec.type == "byte"):
        verb = "takes no" if spec.type == "byte" else "needs a"
        raise InputError(f"the {spec.type} tokenizer {verb} --tokenizer-model")
    if spec.eod_token is not None and spec.type != "hf":
        raise InputError(f"--eod-token is for the hf tokenizer, not {spec.type}")
    if spec.type != "tiktoken" and (spec.eod_id is not None or spec.pattern is not None):
        raise InputError(f"--eod-id and --tiktoken-pattern do not apply to {spec.type}")
    if spec.type == "byte":
        return ByteTokenizer()
    if spec.type == "hf":
        return HFTokenizer(spec.model, spec.eod_token)
    return TiktokenTokenizer(spec.model, spec.eod_id, spec.pattern)


def read_tokenizer_json(file: Path) -> Any:
    """The `tokenizers.Tokenizer` of a file.

    Raises:
        InputError: the library cannot read the file, the tokenizer lengthens texts too much (see
            `check_growth`), or the package is missing.
    """
    library = require("tokenizers", "the hf tokenizer")
    if file.stat().st_size > TOKENIZER_BYTES:
        raise InputError(f"{file} has more than {TOKENIZER_BYTES:,} bytes")
    with ordinary_errors(f"{file} is not a tokenizer.json"):
        tokenizer = library.Tokenizer.from_file(str(file))
    try:
        check_growth(tokenizer)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return tokenizer


def _refuse_pipe(file: Path) -> None:
    """Refuse a pipe or a device: a tokenizer's file is read more than once, and by each worker."""
    if file.exists() and not file.is_dir():
        raise InputError(f"tokenizer {file} is no plain file, and is read more than once: copy it")


def _tokenizer_json(path: Path) -> Path:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        _refuse_pipe(file)
        raise InputError(f"tokenizer file {file} does not exist: give tokenizer.json or its folder")
    return file


def _eos_token(config: Path) -> str | None:
    if not config.is_file():
        return None
    try:
        token = read_json(config).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{config} is not a JSON object: {first_line(error)}") from error
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str | None):
        raise InputError(f"{config}: eos_token is {token!r:.60}, not text")
    return token


def _named_encoding(library: Any, name: str) -> Any:
    known = library.list_encoding_names()
    if name not in known:
        raise InputError(f"{name!r} is no ranks file and no tiktoken encoding: {', '.join(known)}")
    try:
        return library.get_encoding(name)
    except Exception as error:  # several packages raise network, proxy, disk and hash errors
        raise InputError(
            f"tiktoken could not download the encoding {name!r} ({type(error).__name__}): "
            "pass a local ranks file, --tokenizer-model FILE.tiktoken"
        ) from error


def _ranks_encoding(library: Any, file: Path, eod_id: int | None, pattern: str | None) -> Any:
    ranks = _read_ranks(file)
    if pattern is None:
        from tiktoken_ext.openai_public import r50k_pat_str as pattern
    eod = max(ranks.values()) + 1 if eod_id is None else eod_id
    if eod in set(ranks.values()) or eod < 0:
        raise InputError(f"--eod-id {eod} is the rank of a token in {file}, or negative")
    try:
        return library.Encoding(
            file.stem,
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": eod},
        )
    except ValueError as error:
        raise InputError(f"--tiktoken-pattern is wrong: {first_line(error)}") from error


def _read_ranks(file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    if file.stat().st_size > TOKENIZER_BYTES:
        raise InputError(f"{file} has more than {TOKENIZER_BYTES:,} bytes")
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(f"{file}:{number}: not `base64-token rank`") from error
    if len(set(ranks.values())) != len(ranks):
        raise InputError(f"{file} gives two tokens one rank")
    # tiktoken aborts on a byte it has no rank for.
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing:
        raise InputError(f"{file} lacks {missing} of the 256 single bytes: not a full ranks file")
    return ranks
