"""The process that writes a rank's checkpoints asynchronously, and ends when the rank ends.

It imports nothing heavy before it is tied to its rank, which may be killed while the writer starts.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from megatron_mlra.command_line.signals import get_when_parent_ends
from megatron_mlra.fault_tolerance import run_lock

replaced: Callable[..., None] | None = None
"""Megatron's loop, in a process where `write_for_rank` has replaced it; None in a new process."""


def write_for_rank(lock: Path | None, *args) -> None:
    """Megatron's loop of a persistent writer, in a process that ends with its rank.

    Args:
        lock: file of the run lock, which counts as held while this process lives.
        args: of Megatron's loop.
    """
    end_with_rank(multiprocessing.parent_process().pid)
    if lock is not None:
        run_lock.hold(lock)
    if replaced is not None:
        replaced(*args)  # this process is a fork of the rank, where the loop was replaced
        return
    # Megatron warns about every optional package at import.
    warnings.filterwarnings("ignore")
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*args)


def end_with_rank(rank: int) -> None:
    """Kill this process when the process with the id `rank` ends.

    A writer's parent is the fork server, not the rank. The fork server ends when all copies of a
    pipe are closed. Data loaders have copies too, and outlive a killed rank by some seconds.
    """
    get_when_parent_ends(signal.SIGKILL)
    try:
        ended = os.pidfd_open(rank)
    except ProcessLookupError:
        os._exit(1)
    except OSError:
        return  # the kernel or the container does not allow pidfd_open

    def wait() -> None:
        select.select([ended], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="end with rank", daemon=True).start()


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the thread that forked it ends.

    Args:
        parent: id of that thread's process. It may have ended before the kernel was asked.
    """
    get_when_parent_ends(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
