"""Opening a file that somebody else may have put there: a plain file, or nothing.

A look beforehand (`is_file`) says what was there then. What is opened is looked at here.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


class NotPlain(ValueError):
    """No plain file lies there."""


def open_plain(path: str | Path) -> BinaryIO:
    """A plain file, opened for reading. A pipe without a writer is not waited for.

    Raises:
        NotPlain: a folder, a pipe or a device lies there; one line without the name.
        OSError: it cannot be opened.
    """
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise NotPlain("it is no plain file")
    return os.fdopen(opened, "rb")
