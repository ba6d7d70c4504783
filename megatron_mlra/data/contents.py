"""Whether a dataset's files hold what was written: their SHA-256 stand in PREFIX.json.

Hashing takes a second per gigabyte or two, so a file is hashed once: what was found whole is noted,
with its size and time of change, in a small file of the data's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from megatron_mlra.command_line.foreign_text import read_json
from megatron_mlra.command_line.parser import write_text
from megatron_mlra.data.errors import InputError
from megatron_mlra.data.metadata import read_metadata

SUMMED = (".bin", ".idx")
"""Suffixes of the files that have a checksum."""

SAY_FROM = 1 << 30
"""Bytes of a file from which its hashing is announced."""


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder(prefix: str, given: str | None = None) -> Path:
    """Where what is derived from a dataset is kept: `given` (--data-cache-path), else below
    PREFIX/."""
    return Path(given) if given else Path(prefix) / "cache"


def check_contents(
    prefix: str, cache: Path | None, say: Callable[[str], None] = lambda _: None
) -> None:
    """Compare PREFIX.bin and PREFIX.idx with the checksums in PREFIX.json, if there are any.

    Args:
        cache: folder for the note that they were compared; one that cannot be written is left. None
            compares, and notes nothing.
        say: is told of a file that takes seconds.

    Raises:
        InputError: names the file that is not what was written.
    """
    sums = (read_metadata(prefix) or {}).get("sha256")
    if not isinstance(sums, dict):
        return
    name = f"checked-{hashlib.sha256(os.fsencode(prefix)).hexdigest()[:16]}.json"
    note = cache / name if cache else None
    known = _state(prefix, sums)
    with contextlib.suppress(OSError, ValueError):
        if note and note.is_file() and read_json(note) == known:
            return
    for suffix in SUMMED:
        path = prefix + suffix
        if os.path.getsize(path) >= SAY_FROM:
            size = os.path.getsize(path) / 1e9
            say(f"checking {path} ({size:,.0f} GB) against its checksum, once")
        if suffix in sums and sha256(path) != sums[suffix]:
            raise InputError(
                f"data file {path} does not match its checksum in {prefix}.json; copy the data"
                " again, or preprocess it again"
            )
    if not note:
        return
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        write_text(note, json.dumps(known) + "\n")


def _state(prefix: str, sums: dict) -> dict[str, list]:
    """Size, time of change and checksum of each file: as long as these stay, it is not hashed."""
    stats = {suffix: os.stat(prefix + suffix) for suffix in SUMMED}
    return {s: [stat.st_size, stat.st_mtime_ns, sums.get(s)] for s, stat in stats.items()}
