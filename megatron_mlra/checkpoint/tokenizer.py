"""The tokenizer that a Megatron run's data was made with, as the metadata beside the data says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from megatron_mlra.checkpoint.folder import CheckpointFolder
from megatron_mlra.data import read_metadata
from megatron_mlra.data.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    TokenizerSpec,
    build_tokenizer,
    file_sha256,
)
from megatron_mlra.description.model import CheckpointError


def data_tokenizer(source: CheckpointFolder) -> TokenizerSpec | None:
    """What the metadata of the first of the run's data that has any names; None without any.

    Raises:
        CheckpointError: the file it names is gone or is another one.
    """
    for prefix in data_prefixes(source):
        try:
            metadata = read_metadata(prefix)
        except ValueError:
            continue
        described = metadata and metadata.get("tokenizer")
        if not isinstance(described, Mapping):
            continue
        kind, model = str(described.get("type")), described.get("model")
        if "sha256" not in described and kind != "hf":  # an hf tokenizer is always a file
            if model is not None and (os.sep in str(model) or Path(str(model)).exists()):
                raise CheckpointError(f"{prefix}.json names the file {model} without its sha256")
            return TokenizerSpec(kind, model)
        file = Path(str(model))
        if not file.is_file() or file_sha256(file) != described.get("sha256"):
            raise CheckpointError(f"{file} is gone or is not the file the data was made with")
        if kind == "hf":
            return TokenizerSpec(kind, model, described.get("eod_token"))
        return TokenizerSpec(
            kind, model, eod_id=metadata.get("eod_id"), pattern=described.get("pattern")
        )
    return None


def data_prefixes(source: CheckpointFolder) -> list[str]:
    """Where a Megatron run's data was; of other folders nothing."""
    data = getattr(getattr(source, "args", None), "data_path", None) or []
    return [part for part in data if not _is_weight(part)]


def _is_weight(part: str) -> bool:
    try:
        float(part)
    except ValueError:
        return False
    return True


def checkpoint_tokenizer(
    folder: CheckpointFolder, type: str | None = None, model: str | None = None
) -> Tokenizer:
    """The named tokenizer; without a name the tokenizer.json beside the weights, the one the run's
    data was made with, or bytes.

    Bytes are taken for a model of 257 tokens, which is what that tokenizer has.

    Raises:
        ValueError: none can be told, or it has more tokens than the model.
    """
    files = folder.tokenizer_files() or folder.named_tokenizer()
    beside = [path for path in files if path.name == "tokenizer.json"]
    vocab = folder.description.vocab_size
    if type is None and model is not None:
        type = "hf" if Path(model).is_dir() or model.endswith(".json") else "tiktoken"
    if model is None and beside and type in (None, "hf"):
        type, model = "hf", str(beside[0])
    if type is not None:
        spec = TokenizerSpec(type, model)
    else:
        spec = data_tokenizer(folder)
        if spec is None and vocab == ByteTokenizer.vocab_size:
            spec = TokenizerSpec("byte")
    if spec is None:
        raise ValueError(
            f"{folder.path} holds no tokenizer.json; name the tokenizer the model was trained"
            " with: --tokenizer byte, or hf or tiktoken with --tokenizer-model"
        )
    tokenizer = build_tokenizer(spec)
    if tokenizer.vocab_size > vocab:
        raise ValueError(
            f"the {spec.type} tokenizer has {tokenizer.vocab_size} tokens and the model {vocab};"
            " use the tokenizer it was trained with"
        )
    return tokenizer
