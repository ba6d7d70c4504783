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


def two_tokenizers(known: dict[str, dict[str, Any]]) -> str | None:
    """A warning where the metadata of datasets name two tokenizers; None where they do not.

    It is no error: files of two checksums may hold one tokenizer, saved by two libraries.

    Args:
        known: prefix -> metadata.
    """
    # Tokens that came as tokens do not say which tokenizer made them.
    made = {
        prefix: tokenizer
        for prefix, metadata in known.items()
        if isinstance(tokenizer := metadata.get("tokenizer"), dict)
        and tokenizer.get("type", "pretokenized") != "pretokenized"
    }
    first = next(iter(made), None)
    for prefix, tokenizer in made.items():
        if _identity(tokenizer) != _identity(made[first]):
            return (
                f"warning: data {first} were made by {_name(made[first])}, data {prefix} by"
                f" {_name(tokenizer)}; if these differ in more than their files, make one of the"
                " data again by mlra preprocess: the same id means two texts"
            )
    return None


def _identity(tokenizer: dict[str, Any]) -> tuple[Any, ...]:
    """What differs between two tokenizers. A tokenizer without a file of its own has a name."""
    file = tokenizer.get("sha256") or tokenizer.get("model")
    return tokenizer["type"], file, tokenizer.get("pattern")


def _name(tokenizer: dict[str, Any]) -> str:
    words = ["tokenizer", tokenizer["type"], tokenizer.get("model")]
    if checksum := tokenizer.get("sha256"):
        words.append(f"(SHA-256 {checksum:.8}...)")
    return " ".join(map(str, filter(None, words)))
