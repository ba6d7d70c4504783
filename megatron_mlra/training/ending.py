"""How the process of a run ends. Imported before torch, so only the standard library is used."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable

from megatron_mlra.command_line.output import say_error
from megatron_mlra.command_line.ranks import REFUSED, first_of_host, say_refusal
from megatron_mlra.command_line.signals import handle
from megatron_mlra.fault_tolerance import helper_processes
from megatron_mlra.launch.control import INTERRUPTED


def hush_threads() -> None:
    """Silence tracebacks of background threads.

    At exit such threads may still hand tensors to worker processes that have already ended.
    """
    sys.excepthook = lambda *_: None


def end_at_once(line: str) -> None:
    """Print `line` as an error and end this process, from any thread, with exit code 1.

    The main thread may be waiting in a call that nothing interrupts.
    """
    say_error(f"error: {line}")
    os._exit(1)


class EndByInterrupt:
    """Ends this process at a second Ctrl-C, from another thread than the main one.

    Attributes:
        what_is_left: returns the end of the printed line: the run's step and its last checkpoint.
        before: called before the process ends.
    """

    def __init__(self) -> None:
        self.what_is_left: Callable[[], str] = str
        self.before: Callable[[], object] = lambda: None

    def __call__(self) -> None:
        left = ""
        with contextlib.suppress(Exception):
            left = self.what_is_left()
        if first_of_host():
            say_error(f"error: ended at once by a second Ctrl-C{left}")
        helper_processes.kill_from_thread()
        self.before()
        os._exit(INTERRUPTED)


def refuse_python(error: ImportError) -> int:
    """Print which package this Python lacks; returns the exit code of a refused input."""
    line = (
        f"{sys.executable} of host {socket.gethostname()} lacks a package of the run ({error});"
        " install the project there, or set PYTHON to the Python that has it"
    )
    return refuse(line)


def refuse(line: str) -> int:
    """Print why a command line or an input is refused; returns the exit code."""
    say_refusal(line)
    return REFUSED


def kill_children() -> None:
    """Kill the checkpoint writers and the data loaders of a run that failed."""
    hush_threads()
    # torch's handler raises an error in the main thread for a killed data loader.
    handle((signal.SIGCHLD,), signal.SIG_DFL)
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    for child in children:
        child.join(5)


def leave(code: int) -> None:
    """End the process with exit code `code`; returns if `code` is 0.

    After a failure, other ranks may wait in a collective and data loaders may wait for work. The
    process ends without waiting for either.
    """
    sys.stderr.flush()
    if not code:
        return
    kill_children()
    os._exit(code)
