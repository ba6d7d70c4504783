"""Checks that all hosts share a folder: rank 0 writes a file that every other rank must find."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE = 10.0
"""Seconds for which a host may see an earlier state of a shared folder (NFS clients cache)."""


@contextlib.contextmanager
def probe(folder: str | None) -> Iterator[str | None]:
    """Inside the block the folder holds a file that all hosts must see; yields its name, None
    without a folder. The name is new, so that no host has cached its absence."""
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
    """Whether this host sees the probe of this name within `PATIENCE`."""
    return comes_true(lambda: (Path(folder) / name).is_file(), Path(folder))


def comes_true(look: Callable[[], bool], folder: Path) -> bool:
    """Whether `look`, a check of something in `folder`, returns True within `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while not look():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
        with contextlib.suppress(OSError):
            os.listdir(folder)  # refreshes the cache of the NFS client
    return True
