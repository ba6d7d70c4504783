"""Processes that serve a rank's saves: the queue that writers report to, the asynchronous writer.

They must not outlive a rank that is killed, and must outlive the signal that asks it to save, which
schedulers (and `timeout`) send to every process of a job.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.training import initialize

_PR_SET_PDEATHSIG = 1

_manager: SyncManager | None = None


def install(exit_signal: signal.Signals) -> None:
    """Have Megatron's persistent writer, which it may start early, not see `exit_signal`."""
    start_writer = initialize.init_persistent_async_worker

    def start_unseen(*args, **named) -> None:
        with _children_without(exit_signal):
            start_writer(*args, **named)

    initialize.init_persistent_async_worker = start_unseen


def start_results_queue(exit_signal: signal.Signals) -> None:
    """What writers report to, which Megatron would start at its first save: forked later, it would
    keep a killed rank's GPU memory taken.
    """
    global _manager
    _manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    with _children_without(exit_signal):
        _manager.start(end_with_parent)
    filesystem_async._results_queue = _manager.Queue()


def end_with_parent() -> None:
    """Have this process killed when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def _children_without(number: signal.Signals) -> Iterator[None]:
    """Processes started inside never get the signal; one sent to this process waits until then."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
