"""Draws the file of an input that an edit changes."""

from __future__ import annotations

import random
from pathlib import Path


class Skip(Exception):
    """The input holds nothing that the edit can change."""


def pick(rng: random.Random, folder: Path, *patterns: str) -> Path:
    """One of the readable plain files below `folder` whose names match a pattern.

    Raises:
        Skip: there is none.
    """
    files = sorted(
        path
        for pattern in patterns
        for path in folder.rglob(pattern)
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o400
    )
    if not files:
        raise Skip
    return rng.choice(files)
