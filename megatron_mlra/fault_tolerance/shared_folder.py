"""Whether all hosts see one folder: a file that rank 0 writes and every other rank must find."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE = 10.0
"""Seconds for which a host may see a shared folder in an earlier state, as NFS clients do."""


@contextlib.contextmanager
def probe(folder: str | None) -> Iterator[str | None]:
    """Write a file that all hosts must see; yields its name. It is new, so that no host remembers
    that there was none, and removed afterwards."""
    if folder is None:
        yield None
        return
    path = Path(folder) / f".probe.{uuid.uuid4().hex}"
    path.write_text("Seen by all hosts, or the folder is not shared.\n")
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


def sees(folder: str, name: str) -> bool:
    """Whether this host sees a probe, within `PATIENCE`."""
    return comes_true(lambda: (Path(folder) / name).is_file(), Path(folder))


def comes_true(look: Callable[[], bool], folder: Path) -> bool:
    """Whether `look` at something in `folder` is true within `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while not look():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
        with contextlib.suppress(OSError):
            os.listdir(folder)  # asks the file server anew
    return True
