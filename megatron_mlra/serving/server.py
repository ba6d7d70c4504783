"""vLLM's server as a process of this one: started, waited for, ended with all its children."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

END_S = 20
"""What the server has to end in order, before it is killed."""
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
"""The server calls nobody, unless the environment says so."""
_ERROR = re.compile(r"\b([A-Za-z]*Error: .+)$")
_INVALID = re.compile(r"\bValue error, (.+?)(?: \[type=.*)?$")
"""Of pydantic: the line behind its error has what is wrong."""


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened at.

    Raises:
        ValueError: it is taken, or this machine has no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As the server does: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OverflowError:
            raise ValueError(f"--port {port} is no port; use 1 to 65535") from None
        except OSError as error:
            what = (
                "is taken"
                if error.errno == errno.EADDRINUSE
                else f"cannot be used ({error.strerror})"
            )
            raise ValueError(f"port {port} of {host} {what}; use another --port") from None


@contextlib.contextmanager
def running(command: Sequence[str], log: IO[str]) -> Iterator[subprocess.Popen]:
    """The process of a command in a session of its own, which ends with the block."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=QUIET | os.environ,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
    finally:
        # What it started too: engines and workers, which outlive a server that dies.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_healthy(process: subprocess.Popen, host: str, port: int, seconds: float) -> None:
    """Return when the server answers.

    Raises:
        RuntimeError: it ended first, or took longer.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with exit code {process.returncode}")
        connection = http.client.HTTPConnection(host, port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.3)
    raise RuntimeError(f"vLLM did not answer within {seconds:g} s (--start-timeout)")


def last_error(log: Path) -> str | None:
    """What a server's log says last of an error, in one line."""
    found = None
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _INVALID.search(line) or _ERROR.search(line)
        # Not what only says that another process failed.
        if match and "Engine core initialization failed" not in line:
            found = match[1]
    return found
