"""How the process of a run ends. Imported before torch, so it needs the standard library alone."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time

from megatron_mlra.command_line.printable import printable
from megatron_mlra.command_line.signals import handle
from megatron_mlra.launch.control import SPEAKER


def hush_threads() -> None:
    """Silence tracebacks of background threads. At exit they may still be handing tensors to worker
    processes that have already ended."""
    sys.excepthook = lambda *_: None


def end_at_once(line: str) -> None:
    """End this process from any thread, whatever the main thread waits for."""
    os.write(2, f"error: {printable(line)}\n".encode())
    os._exit(1)


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
    if speaks_itself(line):
        os.write(2, f"error: {printable(line)}\n".encode())
    return 2


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
