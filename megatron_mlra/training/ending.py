"""How the process of a run ends. Imported before torch, so it needs the standard library alone."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

from megatron_mlra.command_line.output import say_error
from megatron_mlra.command_line.signals import handle
from megatron_mlra.launch.control import INTERRUPTED, REFUSED, SPEAKER


def hush_threads() -> None:
    """Silence tracebacks of background threads. At exit they may still be handing tensors to worker
    processes that have already ended."""
    sys.excepthook = lambda *_: None


def end_at_once(line: str) -> None:
    """End this process from any thread, whatever the main thread waits for."""
    say_error(f"error: {line}")
    os._exit(1)


class EndByInterrupt:
    """Ends this process from another thread than the main one, at a second Ctrl-C.

    Attributes:
        what_is_left: where the run was, and what can be gone on with, for the end of the line.
        before: called before the process ends.
    """

    def __init__(self) -> None:
        self.what_is_left: Callable[[], str] = str
        self.before: Callable[[], object] = lambda: None

    def __call__(self) -> None:
        left = ""
        with contextlib.suppress(Exception):
            left = self.what_is_left()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say_error(f"error: ended at once by a second Ctrl-C{left}")
        # torch's handler raises an error in the main thread for a killed data loader. Python sets
        # handlers in that thread alone, the system in any.
        ctypes.CDLL(None).signal(int(signal.SIGCHLD), ctypes.c_void_p(None))
        for child in multiprocessing.active_children():
            child.kill()
        self.before()
        os._exit(INTERRUPTED)


def tell_launcher(line: str) -> bool:
    """Leave the reason where torchrun's agent reads it, which hands it on to the other hosts.

    Returns:
        whether it is there: not without an agent, or where its file cannot be written.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError), open(file, "w") as out:
            json.dump({"message": line, "timestamp": int(time.time())}, out)
            return True
    return False


def speaks_itself(line: str) -> bool:
    """Leave why this rank is refused for the launcher.

    Returns:
        whether the rank has to say it: not where the launcher does, or the first rank of its host.
    """
    told = tell_launcher(line)
    return os.environ.get("LOCAL_RANK", "0") == "0" and not (told and SPEAKER in os.environ)


def refuse_python(error: ImportError) -> int:
    """Say what this Python lacks; returns the exit code of a refused input."""
    line = (
        f"{sys.executable} of host {socket.gethostname()} lacks a package of the run ({error});"
        " install the project there, or set PYTHON to the Python that has it"
    )
    return refuse(line)


def refuse(line: str) -> int:
    """Say in one line why a command line or an input is refused, once per host; returns the exit
    code."""
    if speaks_itself(line):
        say_error(f"error: {line}")
    return REFUSED


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
