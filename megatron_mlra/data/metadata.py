"""PREFIX.json: how a dataset was made, so that a trainer can check whether the dataset fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mlra.command_line.foreign_text import read_json
from megatron_mlra.data.errors import InputError

METADATA_VERSION = 1


def read_metadata(prefix: str) -> dict[str, Any] | None:
    """Metadata of the dataset at ``prefix``, or None without PREFIX.json (other tools write none).

    The keys are listed in docs/data.md.

    Raises:
        InputError: the file is damaged, or its `version` is not `METADATA_VERSION`.
    """
    file = Path(prefix + ".json")
    if not file.is_file():
        return None
    try:
        metadata = read_json(file)
        version = metadata["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is not a dataset's metadata: tokenise the data again") from error
    if version != METADATA_VERSION:
        raise InputError(f"{file} has version {version}, expected {METADATA_VERSION}")
    return metadata
