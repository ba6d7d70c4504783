"""PREFIX.json: what a dataset was made from, so that a trainer can check that it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mlra.foreign_text import read_json

from .errors import InputError

METADATA_VERSION = 1


def read_metadata(prefix: str) -> dict[str, Any] | None:
    """Metadata of the dataset at ``prefix``, or None where it has none (other tools write none).

    The keys are listed in docs/data.md.

    Raises:
        InputError: the file is damaged or of another version.
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
