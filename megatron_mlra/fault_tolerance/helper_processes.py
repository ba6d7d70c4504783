"""Processes that serve a rank's saves: the queue that writers report to, the asynchronous writer.

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
        lock: of the save folder, which counts as held while the writer lives.
    """
    writer_process.replaced = loop
    return functools.partial(writer_process.write_for_rank, lock)


def unseen(start_writer: Callable[..., None], stops: Set[signal.Signals]) -> Callable[..., None]:
    """Megatron's `init_persistent_async_worker`, whose process does not see the signals `stops`."""

    def start_unseen(*args, **named) -> None:
        with _children_without(stops):
            start_writer(*args, **named)

    return start_unseen


def results_queue(stops: Set[signal.Signals]) -> Queue:
    """The queue that writers report to, its process started now and not at the first save; it does
    not see the signals `stops`."""
    global _manager
    _manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    with _children_without(stops):
        _manager.start(writer_process.end_with_parent)
    return _manager.Queue()


@contextlib.contextmanager
def _children_without(stops: Set[signal.Signals]) -> Iterator[None]:
    """Processes started inside never get the signals; one sent to this process waits until then."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
