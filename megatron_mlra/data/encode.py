"""Raw documents to token arrays, batch by batch: the work of a worker process. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_mlra.command_line.foreign_text import parse_json
from megatron_mlra.data.errors import BadRecordError
from megatron_mlra.data.readers import Batch
from megatron_mlra.data.tokenizers import ByteTokenizer, Tokenizer

UINT16_VOCAB_LIMIT = 65500
"""Megatron stores vocabularies below this size as uint16, others as int32."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of a batch."""

    source: int
    """Index of the batch's source."""
    tokens: np.ndarray
    """All documents, concatenated, uint16 or int32 [sum of lengths]."""
    lengths: np.ndarray
    """Tokens of each document, its EOD included, int64 [documents]; at least 1."""
    problems: list[str] = field(default_factory=list)
    """``file:line: reason`` of each bad record, in order."""
    empty: int = 0
    """Number of documents without text, which are left out."""
    consumed: int = 0
    """Bytes of the source that the batch was read from."""


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The type in which Megatron stores the tokens of a vocabulary."""
    return np.uint16 if vocab_size < UINT16_VOCAB_LIMIT else np.int32


class Encoder:
    """Decodes, parses and tokenises batches."""

    def __init__(self, tokenizer: Tokenizer, *, append_eod: bool, json_key: str) -> None:
        self._tokenizer = tokenizer
        self._append_eod = append_eod
        self._json_key = json_key
        self._dtype = token_dtype(tokenizer.vocab_size)

    def encode(self, batch: Batch) -> Encoded:
        """Tokens of a batch. A record that cannot be encoded is listed in `problems`."""
        arrays: list[np.ndarray] = []
        lengths: list[int] = []
        problems: list[str] = []
        empty = 0
        for number, document in enumerate(batch.documents, start=batch.first):
            line = batch.parser in ("json", "text") and isinstance(document, bytes)
            if line and document.isspace():
                continue
            try:
                ids = self._ids(self._text(document, batch.parser))
            except BadRecordError as error:
                problems.append(f"{_place(batch, number)}: {error}")
                continue
            if ids.size == 0:
                empty += 1
                continue
            arrays.append(ids)
            lengths.append(ids.size + self._append_eod)
            if self._append_eod:
                arrays.append(np.array([self._tokenizer.eod], dtype=self._dtype))
        if batch.failure is not None:
            number = batch.first + len(batch.documents)
            problems.append(f"{_place(batch, number)}: {batch.failure}")
        return Encoded(
            source=batch.source,
            tokens=np.concatenate(arrays) if arrays else np.empty(0, self._dtype),
            lengths=np.array(lengths, dtype=np.int64),
            problems=problems,
            empty=empty,
            consumed=batch.consumed,
        )

    def _ids(self, text: str) -> np.ndarray:
        try:
            if isinstance(self._tokenizer, ByteTokenizer):
                return self._tokenizer.tokenize_array(text).astype(self._dtype)
            return np.array(self._tokenizer.tokenize(text), dtype=self._dtype)
        except Exception as error:  # three packages raise their own; the message needs the place
            reason = f"the tokenizer failed: {type(error).__name__}: {error}"
            raise BadRecordError(" ".join(reason.split())) from error

    def _text(self, document: bytes | int | None, parser: str) -> str:
        if document is None:
            raise BadRecordError("the cell is null")
        if isinstance(document, int):
            raise BadRecordError(
                f"the record has more than {document / 1e6:g} MB: raise --max-record-mb"
            )
        try:
            text = document.decode("utf-8")
        except UnicodeDecodeError as error:
            line = document.count(b"\n", 0, error.start) + 1
            where = f"line {line}, " if parser == "file" else ""
            raise BadRecordError(
                f"invalid UTF-8 ({where}byte 0x{document[error.start]:02x} at offset {error.start})"
            ) from error
        if parser in ("json", "text"):
            text = text.rstrip("\r\n")
        return self._json_text(text) if parser == "json" else text

    def _json_text(self, line: str) -> str:
        try:
            record = parse_json(line)
        except json.JSONDecodeError as error:
            what = f"{error.msg}: column {error.colno}"
            if line[:1] == "[" or line.strip() == "{":  # a whole file of JSON, not one of its lines
                what += "; an object must lie on one line, without a list around all of them"
            raise BadRecordError(f"invalid JSON ({what})") from error
        except ValueError as error:
            raise BadRecordError(f"invalid JSON ({error})") from error
        if not isinstance(record, dict):
            raise BadRecordError(f"not a JSON object but {type(record).__name__}")
        if self._json_key not in record:
            raise BadRecordError(f"no key {self._json_key!r} {_other_keys(record)}")
        text = record[self._json_key]
        if not isinstance(text, str):
            kind = type(text).__name__
            raise BadRecordError(f"the value of {self._json_key!r} is {kind}, not a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise BadRecordError(f"the text holds a lone surrogate, \\u{code:04x}") from error
        return text


def _other_keys(record: dict[str, Any]) -> str:
    """What a record holds in place of the key of the text."""
    if not record:
        return "and no other"
    known = ", ".join(repr(key[:40]) + "..." * (len(key) > 40) for key in [*record][:3])
    more = f" and {len(record) - 3:,} more" if len(record) > 3 else ""
    return f"but {known}{more} (--json-key names another)"


def _place(batch: Batch, number: int) -> str:
    return batch.path if batch.parser == "file" else f"{batch.path}:{number}"
