"""The tokenizer that a Megatron run's data was made with, as the metadata beside the data says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from megatron_mlra.checkpoint.description import CheckpointError
from megatron_mlra.checkpoint.folders import CheckpointFolder
from megatron_mlra.preprocess import read_metadata
from megatron_mlra.preprocess.tokenizers import TokenizerSpec, file_sha256


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
