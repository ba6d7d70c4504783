"""How the process of a run ends. Imported before torch, so it needs the standard library alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys

from megatron_mlra.command_line.signals import handle


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
    # torch's handler, set in the main thread alone, raises an error for a killed data loader.
    handle((signal.SIGCHLD,), signal.SIG_DFL)
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
