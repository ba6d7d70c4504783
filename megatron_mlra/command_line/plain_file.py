"""Opening a file that somebody else may have put there, if it is a plain file; and checksums.

`is_file` before `open` leaves time to replace the file. Here the opened file itself is checked.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO


class NotPlain(ValueError):
    """The path names a folder, a pipe or a device."""


def open_plain(path: str | Path) -> BinaryIO:
    """A plain file, opened for reading. Opening a pipe without a writer does not block.

    Raises:
        NotPlain: `path` is a folder, a pipe or a device; one line without the name.
        OSError: the file cannot be opened.
    """
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise NotPlain("it is no plain file")
    return os.fdopen(opened, "rb")


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
