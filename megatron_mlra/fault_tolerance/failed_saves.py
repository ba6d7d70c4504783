"""The errors of saves that fail, and the watch over the processes that an asynchronous save needs.

Megatron asks only whether the writer has put a result into a queue. The kernel may kill a writer
for want of memory. The run would then train on without any more checkpoints, and wait for the
writer for ever at its next save and at its end.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import socket
import threading
from argparse import Namespace
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from queue import Empty
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from megatron_mlra.checkpoint.files.tracker import latest_step
from megatron_mlra.fault_tolerance import heartbeat, helper_processes
from megatron_mlra.fault_tolerance.integrity import reason

_POLL = 0.2
"""Seconds between two looks at a writer for which its rank waits."""

_CAUSES = {
    signal.SIGKILL: ", as the kernel does for want of memory",
    signal.SIGBUS: ", as where /dev/shm is full",
}
_MENDS = {
    signal.SIGKILL: "give the job more memory, or each host fewer ranks, and ",
    signal.SIGBUS: "make /dev/shm larger, and ",
}


class HelperEnded(RuntimeError):
    """A process that an asynchronous save needs has ended."""


def watched(start_writer: Callable[..., BaseProcess]) -> Callable[..., BaseProcess]:
    """Megatron's `_get_process`, which starts a writer; its rank no longer waits for one that has
    ended."""

    def start_watched(*args: Any, **named: Any) -> BaseProcess:
        writer, caller = start_writer(*args, **named), PersistentAsyncCaller
        if not isinstance(caller._persistent_queue, _Queue):
            caller._persistent_preload_q = _Queue(caller._persistent_preload_q, writer)
            caller._persistent_comp_q = _Queue(caller._persistent_comp_q, writer)
            # Joined once all saves are finalized: a writer that has ended is not missed then.
            caller._persistent_queue = _Queue(caller._persistent_queue, writer, is_missed=False)
        return writer

    return start_watched


class _Queue:
    """A rank's side of a queue to or from its writer.

    Args:
        queue: of multiprocessing.
        writer: its process.
        is_missed: whether `join` raises for a writer that has ended.
    """

    def __init__(self, queue: Any, writer: BaseProcess, is_missed: bool = True) -> None:
        self._queue, self._writer, self._is_missed = queue, writer, is_missed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def get_nowait(self) -> Any:
        """The next item.

        Raises:
            Empty: there is none yet.
            HelperEnded: there will be none.
        """
        try:
            return self._queue.get_nowait()
        except Empty:
            check()
            raise

    def join(self) -> None:
        """Wait until the writer has taken all items, or has ended.

        Raises:
            HelperEnded: it has ended.
        """
        # A killed process leaves the queue's lock as it was, perhaps taken: no wait for the lock
        # has an end then, and this one stays in its thread.
        joined = threading.Thread(target=self._queue.join, name="join writer", daemon=True)
        joined.start()
        while joined.is_alive() and self._writer.exitcode is None:
            joined.join(_POLL)
        if joined.is_alive() and self._is_missed:
            check()


def check() -> None:
    """Check that the processes that an asynchronous save needs are there.

    Raises:
        HelperEnded: one is not.
    """
    if ended():
        raise HelperEnded


def ended() -> BaseProcess | None:
    """The first of the processes that an asynchronous save needs which has ended by itself."""
    if helper_processes.are_killed:
        return None
    there = (PersistentAsyncCaller._persistent_process, helper_processes.results_process())
    return next((process for process in there if process and process.exitcode is not None), None)


def without_helper(args: Namespace, process: BaseProcess, steps: Sequence[int]) -> RuntimeError:
    """Tell all ranks that `process` of this one has ended, which ends them; returns the error to
    raise where ranks do not watch each other.

    Args:
        args: of the run.
        process: a result of `ended`.
        steps: those whose saves are not finalized, in order.
    """
    line = _line(args, process, steps)
    heartbeat.tell(line)
    return RuntimeError(line)


def _line(args: Namespace, process: BaseProcess, steps: Sequence[int]) -> str:
    is_writer = process is PersistentAsyncCaller._persistent_process
    what = "writes" if is_writer else "collects the results of writing"
    code, kept = process.exitcode, latest_step(args.save)
    if code < 0:
        name = next((it.name for it in signal.Signals if it == -code), f"signal {-code}")
        how, mend = f"was killed by {name}{_CAUSES.get(-code, '')}", _MENDS.get(-code, "")
    else:
        how, mend = f"ended with exit code {code}; its own output says why", ""
    if steps:
        several = len(steps) > 1
        named = " and ".join(f"{step:,}" for step in steps)
        state = f"the checkpoint{'s' * several} of step{'s' * several} {named}"
        state += " are not complete" if several else " is not complete"
        state += ", and there is none earlier" if kept is None else f", that of step {kept:,} is"
    else:
        state = "no checkpoint was being written, "
        state += "and there is none yet" if kept is None else f"that of step {kept:,} is complete"
    folder = shlex.quote(args.save)
    return (
        f"the process that {what} rank {args.rank}'s checkpoints (pid {process.pid}, host"
        f" {socket.gethostname()}) {how}; {state}; {mend}go on with --load {folder} --save {folder}"
    )


def not_saved(folder: str, step: int, error: BaseException) -> RuntimeError:
    """The error for a checkpoint that could not be written; names the newest one that is intact."""
    kept = latest_step(folder)
    remains = "there is none earlier" if kept is None else f"that of step {kept:,} is intact"
    why = reason(error)
    if "unexpected pos" in why:
        # torch's message when the disk is full in the middle of writing a tensor.
        why = f"No space left on device ({shutil.disk_usage(folder).free / 1e6:.1f} MB free)"
    return RuntimeError(
        f"the checkpoint of step {step:,} could not be saved to {folder}: {why}; {remains}"
    )
