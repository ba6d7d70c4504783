"""How the process of a run ends. Imported before torch, so it needs the standard library alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys


def hush_threads() -> None:
    """Silence tracebacks of background threads. At exit they may still be handing tensors to worker
    processes that have already ended."""
    sys.excepthook = lambda *_: None


def end_at_once(line: str) -> None:
    """End this process from any thread, whatever the main thread waits for."""
    os.write(2, f"error: {line}\n".encode())
    os._exit(1)


def kill_children() -> None:
    """End the writers of checkpoints and the data loaders of a run that failed."""
    hush_threads()
    # torch's handler raises an error for a data loader that is killed.
    with contextlib.suppress(ValueError):  # outside the main thread, there is none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    for child in children:
        child.join(5)


def leave(code: int) -> None:
    """End the process. After a failure other ranks may wait in a collective, and data loaders for
    work: wait for neither."""
    sys.stderr.flush()
    if not code:
        return
    kill_children()
    os._exit(code)
