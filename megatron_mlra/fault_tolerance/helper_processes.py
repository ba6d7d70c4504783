"""The helper processes of a rank: the asynchronous writer, the queue of its results, and those that
load data.

Two rules. A helper dies with its rank (else it would keep writing into a checkpoint that the
restarted job is writing). But it ignores the stop signals, which schedulers and terminals send to
every process of a job: the rank still needs its helpers for that last save.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Set
from multiprocessing.managers import SyncManager
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Queue
from typing import Any

from megatron_mlra.fault_tolerance import writer_process

are_killed = False
"""Whether this process has killed its helpers, since it ends."""
_manager: SyncManager | None = None
_writer: BaseProcess | None = None


def tied(loop: Callable[..., None], lock: Path | None) -> Callable[..., None]:
    """Megatron's loop of a persistent writer, in a process that ends with its rank.

    Args:
        loop: Megatron's function.
        lock: file of the run lock, which counts as held while the writer lives.
    """
    writer_process.replaced = loop
    return functools.partial(writer_process.write_for_rank, lock)


def unseen(start_writer: Callable[..., Any], stops: Set[signal.Signals]) -> Callable[..., Any]:
    """Megatron's `_get_process`, which starts a writer; its process has the signals `stops`
    blocked."""

    def start_unseen(*args, **named) -> Any:
        global _writer
        with _children_without(stops):
            _writer = start_writer(*args, **named)
        return _writer

    return start_unseen


def results_queue(stops: Set[signal.Signals]) -> Queue:
    """The queue for the writers' results. Its process starts now instead of at the first save, with
    the signals `stops` blocked."""
    global _manager
    _manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    with _children_without(stops):
        _manager.start(writer_process.end_with_parent, (os.getpid(),))
    return _manager.Queue()


def results_process() -> BaseProcess | None:
    """The process of `results_queue`; None before its start."""
    return _manager._process if _manager else None


def end_writer() -> None:
    """End the latest writer, of a run that has ended.

    Megatron ends a writer that has written. At its exit Python asks all others to end by SIGTERM,
    which they have blocked, and waits.
    """
    if _writer is not None and _writer.exitcode is None:
        _writer.kill()
        _writer.join()


def kill_from_thread() -> None:
    """Kill all helpers, from any thread, just before this process ends. A writer that lives would
    keep the lock of `--save`."""
    global are_killed
    are_killed = True
    # torch's handler raises an error in the main thread for a killed data loader. Python can
    # replace handlers in the main thread alone, the C library in any thread.
    ctypes.CDLL(None).signal(int(signal.SIGCHLD), ctypes.c_void_p(None))
    for child in multiprocessing.active_children():
        child.kill()


def tied_loaders(build: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `build_pretraining_data_loader`, of loaders whose processes end with the rank.

    torch's look every 5 s whether the parent is another one than at their start. They wait for ever
    where the rank was killed before that first look.
    """

    def build_tied(*args: Any, **named: Any) -> Any:
        loader = build(*args, **named)
        if getattr(loader, "num_workers", 0):
            loader.worker_init_fn = functools.partial(
                _start_loader, os.getpid(), loader.worker_init_fn
            )
        return loader

    return build_tied


def _start_loader(rank: int, start: Callable[[int], None] | None, number: int) -> None:
    writer_process.end_with_parent(rank)
    if start is not None:
        start(number)


@contextlib.contextmanager
def _children_without(stops: Set[signal.Signals]) -> Iterator[None]:
    """Processes started inside the block have these signals blocked. Signals to this process wait
    until the end of the block."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
