"""Prefixes of datasets on a command line: PREFIX names PREFIX.bin and PREFIX.idx. Only the standard
library is used, so that a wrong prefix is refused before slow imports."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

NO_DATA = (
    "no data: give --data-path PREFIX (mlra preprocess writes PREFIX.bin and PREFIX.idx) or"
    " --mock-data"
)


def is_number(word: str) -> bool:
    """Whether a word of a blend (`0.3 data/a 0.7 data/b`) is a weight. Weights that are not finite
    count too; they are refused later."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def without_weights(words: Iterable[str]) -> list[str]:
    """The prefixes of a blend, each once."""
    return list(dict.fromkeys(word for word in words if not is_number(word)))


def a_dataset(value: str, flag: str) -> None:
    """The check of a parser's argument NAME=PREFIX or PREFIX, see command_line/early.py.

    Raises:
        ValueError: see `check_files`.
    """
    _, equals, prefix = value.partition("=")
    check_files(prefix if equals else value, flag)


def check_files(prefix: str, flag: str = "--data-path") -> None:
    """Check that a dataset's two files are there.

    Args:
        flag: that names the dataset, for the message.

    Raises:
        ValueError: one is missing; names the file and the fix.
    """
    for suffix in (".idx", ".bin"):
        path = Path(prefix + suffix)
        if path.is_file():
            continue
        stem, dot, last = prefix.rpartition(".")
        metadata = last == "json" and Path(f"{stem}.idx").is_file()
        if dot and (last in ("bin", "idx") or metadata):
            raise ValueError(f"{flag} {prefix} names a file; leave .{last} out: {stem}")
        if Path(prefix).is_file():
            raise ValueError(
                f"{flag} {prefix} is no data yet; mlra preprocess --input {shlex.quote(prefix)}"
                f" --output-prefix PREFIX makes them, for {flag} PREFIX"
            )
        raise ValueError(f"data file {path} does not exist; make it with mlra preprocess")
