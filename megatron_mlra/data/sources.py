"""The input files that the arguments name, checked before any work."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mlra.data.errors import InputError

FORMATS = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".bin": "tokens",
}
COMPRESSIONS = (".gz", ".zst")
_COMPRESSIBLE = ("text", "jsonl")


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: str
    format: str
    """text, jsonl, parquet, or tokens (uint16 shards)."""
    compression: str | None
    """.gz, .zst, or None."""
    size: int
    """Bytes on disk."""


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Expand paths and globs, in the order given; the matches of a glob are sorted.

    Raises:
        InputError: a glob matches nothing; a file is missing, unreadable, named twice, or has an
            unknown suffix; or token shards are mixed with text.
    """
    if not inputs:
        raise InputError("no input files")
    paths = [path for name in inputs for path in _expand(name)]
    seen: dict[str, str] = {}
    for path in paths:
        other = seen.setdefault(os.path.realpath(path), path)
        if other is not path:
            raise InputError(f"input {path} is named twice (also as {other})")
    sources = [_inspect(path) for path in paths]
    tokens = [source.path for source in sources if source.format == "tokens"]
    if tokens and len(tokens) != len(sources):
        other = next(source.path for source in sources if source.format != "tokens")
        raise InputError(f"token shards and text cannot be mixed: {tokens[0]} and {other}")
    return sources


def _expand(name: str) -> list[str]:
    if os.path.exists(name) or not glob.has_magic(name):
        return [name]
    matches = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
    if not matches:
        raise InputError(f"no file matches {name}")
    return matches


def _first_suffix(folder: str) -> str:
    """The suffix of the first file in a folder that is an input, else that of JSON lines."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        names = []
    for name in names:
        base, suffix = os.path.splitext(name.lower())
        packed = suffix if suffix in COMPRESSIONS else ""
        kind = os.path.splitext(base)[1] if packed else suffix
        if kind in FORMATS:
            return kind + packed
    return ".jsonl"


def _inspect(path: str) -> Source:
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"input {path}: {error.strerror}") from error
    if stat.S_ISDIR(status.st_mode):
        files = f"{path}/*{_first_suffix(path)}"
        raise InputError(f"input {path} is a folder: name its files, such as {files}")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"input {path} is not a regular file")
    base, suffix = os.path.splitext(path.lower())
    compression = suffix if suffix in COMPRESSIONS else None
    if compression:
        suffix = os.path.splitext(base)[1]
    kind = FORMATS.get(suffix)
    if kind is None or (compression and kind not in _COMPRESSIBLE):
        raise InputError(
            f"input {path} has an unknown suffix: use {', '.join(FORMATS)}; "
            f"text and JSON lines also with {' or '.join(COMPRESSIONS)}"
        )
    try:
        open(path, "rb").close()
    except OSError as error:
        raise InputError(f"input {path}: {error.strerror}") from error
    return Source(path=path, format=kind, compression=compression, size=status.st_size)
