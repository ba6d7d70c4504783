"""Observes what this rank's threads do: collectives started, waiting in communication, stacks."""

from __future__ import annotations

import contextlib
import faulthandler
import linecache
import sys
from pathlib import Path

from torch.distributed import distributed_c10d

from megatron_mlra.command_line.parser import aside


def collectives() -> int:
    """Number of collectives that this rank has started, over all its process groups."""
    count = 0
    for group in list(distributed_c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):
            count += group._get_sequence_number_for_group()
    return count


def communication(thread: int) -> tuple[bool, str]:
    """(Whether a thread is inside communication, the line of code that it executes)."""
    frame = sys._current_frames()[thread]
    code = frame.f_code
    at = f"{Path(code.co_filename).name}:{frame.f_lineno} ({code.co_name})"
    # Megatron waits for point-to-point requests by `.wait(` in its own code.
    line = linecache.getline(code.co_filename, frame.f_lineno)
    waiting = "/megatron/core/" in code.co_filename and ".wait(" in line
    while frame and not waiting:
        waiting = frame.f_code.co_filename == distributed_c10d.__file__
        frame = frame.f_back
    return waiting, at


def leave_stacks(log: Path) -> None:
    """Write the stacks of all threads into a new file; a link at its path is replaced."""
    with contextlib.suppress(OSError), aside(log).open("x") as file:
        faulthandler.dump_traceback(file, all_threads=True)
