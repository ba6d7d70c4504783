"""Compares a dataset's files with the SHA-256 checksums in PREFIX.json.

Hashing takes about a second per 1 to 2 GB, so each file is hashed once. A small file in the data's
cache folder then records its checksum, size and modification time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from megatron_mlra.command_line.foreign_text import read_json
from megatron_mlra.command_line.parser import write_json
from megatron_mlra.command_line.plain_file import sha256
from megatron_mlra.data.errors import InputError
from megatron_mlra.data.metadata import read_metadata

SUMMED = (".bin", ".idx")
"""Suffixes of the files that have a checksum."""

SAY_FROM = 1 << 30
"""Least bytes of a file whose hashing is announced."""


def cache_folder(prefix: str, given: str | None = None) -> Path:
    """Folder of files derived from a dataset: `given` (--data-cache-path), else PREFIX/cache."""
    return Path(given) if given else Path(prefix) / "cache"


def check_contents(
    prefix: str, cache: Path | None, say: Callable[[str], None] = lambda _: None
) -> None:
    """Compare PREFIX.bin and PREFIX.idx with the checksums in PREFIX.json, if there are any.

    Args:
        cache: folder of the record that the files match; not needed if it cannot be written. None
            compares the files and records nothing.
        say: called with one line for each file whose hashing takes seconds.

    Raises:
        InputError: a file differs from its checksum; names the file.
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
        write_json(note, known)


def _state(prefix: str, sums: dict) -> dict[str, list]:
    """Suffix -> [size, modification time in ns, checksum]; a change means to hash again."""
    stats = {suffix: os.stat(prefix + suffix) for suffix in SUMMED}
    return {s: [stat.st_size, stat.st_mtime_ns, sums.get(s)] for s, stat in stats.items()}
