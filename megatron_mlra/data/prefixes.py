"""Prefixes of datasets on a command line: PREFIX.bin and PREFIX.idx. Nothing beyond the standard
library, so that a prefix that is none is refused before anything is imported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

NO_DATA = (
    "no data: give --data-path PREFIX (mlra preprocess writes PREFIX.bin and PREFIX.idx) or"
    " --mock-data"
)


def is_number(word: str) -> bool:
    """Whether a word of a blend is a weight: `0.3 data/a 0.7 data/b`. One that is not finite is
    one too, which is refused later."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def without_weights(words: Iterable[str]) -> list[str]:
    """The prefixes of a blend, each once."""
    return list(dict.fromkeys(word for word in words if not is_number(word)))


def check_files(prefix: str) -> None:
    """Check that a dataset's two files are there.

    Raises:
        ValueError: names the file that is not, and what to do.
    """
    for suffix in (".idx", ".bin"):
        path = Path(prefix + suffix)
        if path.is_file():
            continue
        stem, dot, last = prefix.rpartition(".")
        if dot and last in ("bin", "idx"):
            raise ValueError(f"--data-path {prefix} names a file; leave .{last} out: {stem}")
        raise ValueError(f"data file {path} does not exist; make it with mlra preprocess")
