"""Processes that serve a rank's saves: the queue that writers report to, the asynchronous writer.

They must not outlive a rank that is killed, and must outlive the signal that asks it to save, which
schedulers (and `timeout`) send to every process of a job.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing.managers import SyncManager
from pathlib import Path

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.training import initialize

from megatron_mlra.checkpoint import writer_process

_manager: SyncManager | None = None


def install(exit_signal: signal.Signals, lock: Path | None) -> None:
    """Have Megatron's persistent writer, which it may start early, not see `exit_signal`, end with
    its rank, and hold the `lock` of the save folder, if any."""
    start_writer = initialize.init_persistent_async_worker
    writer_process.replaced = PersistentAsyncCaller.async_loop

    def start_unseen(*args, **named) -> None:
        PersistentAsyncCaller.async_loop = staticmethod(
            functools.partial(writer_process.write_for_rank, lock)
        )
        try:
            with _children_without(exit_signal):
                start_writer(*args, **named)
        finally:
            PersistentAsyncCaller.async_loop = staticmethod(writer_process.replaced)

    initialize.init_persistent_async_worker = start_unseen


def start_results_queue(exit_signal: signal.Signals) -> None:
    """What writers report to, which Megatron would start at its first save: forked later, it would
    keep a killed rank's GPU memory taken.
    """
    global _manager
    _manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    with _children_without(exit_signal):
        _manager.start(writer_process.end_with_parent)
    filesystem_async._results_queue = _manager.Queue()


@contextlib.contextmanager
def _children_without(number: signal.Signals) -> Iterator[None]:
    """Processes started inside never get the signal; one sent to this process waits until then."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
