"""vLLM's server as a child process: starting, waiting, and ending it with all its children."""

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
from functools import partial
from pathlib import Path
from typing import IO

import psutil

from megatron_mlra.command_line.signals import get_when_parent_ends

END_S = 20
"""Seconds that the server has to end by itself before it is killed."""
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
"""Environment in which the server contacts no other host; the user's environment overrides it."""
_ERROR = re.compile(r"\b([A-Za-z]*Error: .+)$")
_USAGE = re.compile(r"^[\w.]+\.py: error: (.+)$")
"""A line of argparse, on words behind `--`."""
_INVALID = re.compile(r"\bValue error, (.+?)(?: \[type=.*)?$")
"""The line after an error of pydantic, which states the fault."""
_FIELD = re.compile(r"^(?:\([^)]*\) )?(\S+)$")
_OF_FIELD = re.compile(r"^(?:\([^)]*\) )?  (\S.*) \[type=\w+, input_value=(.*), input_type=\w+\]$")
"""The name of a field, and the line behind it, in an error of pydantic on fields."""


def check_port(host: str, port: int) -> None:
    """Check that the server can listen at an address.

    Raises:
        ValueError: the port is taken or invalid, or this machine does not have the address.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"--port {port} is no port; use 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As the server does: else a port whose last connections are still closing would be taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(f"port {port} of {host} is taken; use another --port") from None
            which = "--port" if error.errno in (errno.EACCES, errno.EPERM) else "--host"
            raise ValueError(
                f"port {port} of {host} cannot be used ({error.strerror}); use another {which}"
            ) from None
        except TypeError:  # its letters cannot be encoded
            raise ValueError(f"--host {host} is no host's name; use another") from None


@contextlib.contextmanager
def running(command: Sequence[str], log: IO[str]) -> Iterator[subprocess.Popen]:
    """Inside the block a command runs in its own session; the process ends with the block, and gets
    SIGTERM where this process is killed."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=QUIET | os.environ,
        start_new_session=True,
        preexec_fn=partial(get_when_parent_ends, signal.SIGTERM),
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
        # Its engines and workers too, which outlive a server that dies.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_healthy(process: subprocess.Popen, host: str, port: int, seconds: float) -> None:
    """Return when the server answers. What another process answers at its port does not count: two
    servers may be given one port, and only the first that is ready gets it.

    Raises:
        RuntimeError: the server ended, or did not answer within `seconds`.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with exit code {process.returncode}")
        connection = http.client.HTTPConnection(host, port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200 and _listens(process, port):
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.3)
    raise RuntimeError(f"vLLM did not answer within {seconds:g} s (--start-timeout)")


def _listens(process: subprocess.Popen, port: int) -> bool:
    """Whether a process or one below it listens at a port; also if the system does not tell."""
    try:
        own = psutil.Process(process.pid)
        found = [
            connection
            for one in (own, *own.children(recursive=True))
            for connection in one.net_connections("tcp")
        ]
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in found)


def last_error(log: Path) -> str | None:
    """The last error in a server's log, in one line; None without any."""
    found, field, fields = None, "", []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _INVALID.search(line) or _USAGE.search(line) or _ERROR.search(line)
        # That line only reports the failure of another process.
        if match and "Engine core initialization failed" not in line:
            found, fields = match[1], []
        elif match := _FIELD.search(line):
            field = match[1]
        elif match := _OF_FIELD.search(line):
            fields.append(f"{field}: {match[1]}, and is {match[2]}")
            found = "; ".join(fields)
    return found
