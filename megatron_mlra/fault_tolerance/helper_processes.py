"""The helper processes of a rank's saves: the asynchronous writer, and the queue of its results.

Two rules. A helper dies with its rank (else it would keep writing into a checkpoint that the
restarted job is writing). But it ignores the stop signals, which schedulers and terminals send to
every process of a job: the rank still needs its helpers for that last save.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Set
from multiprocessing.managers import SyncManager
from pathlib import Path
from queue import Queue

from megatron_mlra.fault_tolerance import writer_process

_manager: SyncManager | None = None


def tied(loop: Callable[..., None], lock: Path | None) -> Callable[..., None]:
    """Megatron's loop of a persistent writer, in a process that ends with its rank.

    Args:
        loop: Megatron's function.
        lock: file of the run lock, which counts as held while the writer lives.
    """
    writer_process.replaced = loop
    return functools.partial(writer_process.write_for_rank, lock)


def unseen(start_writer: Callable[..., None], stops: Set[signal.Signals]) -> Callable[..., None]:
    """Megatron's `init_persistent_async_worker`; its process has the signals `stops` blocked."""

    def start_unseen(*args, **named) -> None:
        with _children_without(stops):
            start_writer(*args, **named)

    return start_unseen


def results_queue(stops: Set[signal.Signals]) -> Queue:
    """The queue for the writers' results. Its process starts now instead of at the first save, with
    the signals `stops` blocked."""
    global _manager
    _manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    with _children_without(stops):
        _manager.start(writer_process.end_with_parent)
    return _manager.Queue()


@contextlib.contextmanager
def _children_without(stops: Set[signal.Signals]) -> Iterator[None]:
    """Processes started inside the block have these signals blocked. Signals to this process wait
    until the end of the block."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
