"""A process that has Megatron imported, from which all tests of a session fork what they run.

Importing takes 6 to 10 s of CPU, a fork milliseconds. The first test process that wants it starts
it (`connect`); those beside it share it, and it ends with the last of them. Each connection is
served by a fork: with jobs (support/entry_worker.py), or by becoming a Python program, which
support/warm_python.py asks for in the place of the interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from support import ENV

READY = b"ready\n"
Handler = Callable[[socket.socket], int]


def connect(folder: Path) -> socket.socket:
    """A connection to the process of the session whose folder this is, started if need be."""
    path = folder / "warm"
    with open(folder / "warm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            return greeted(path)
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "support.entry_worker", path]
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=ENV
        )
        with server.stdout:
            assert server.stdout.readline() == READY, "the process to fork from did not start"
        return greeted(path)


def greeted(path: Path) -> socket.socket:
    """A connection that is served; OSError where nobody does."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
        if connection.recv(len(READY)) != READY:
            raise ConnectionRefusedError
    except OSError:
        connection.close()
        raise
    return connection


def write_python(folder: Path, session: Path) -> Path:
    """Write into `folder` a program that stands for this Python, and runs in a fork what it is
    given; see `become_python` for what it takes."""
    path = folder / "python"
    text = (Path(__file__).parent / "warm_python.py").read_text()
    path.write_text(f"#!{sys.executable} -IS\n" + text.replace("SOCKET", str(session / "warm")))
    path.chmod(0o755)
    return path


def serve(path: Path, jobs: Handler) -> None:
    """Serve connections until there is none; everything to be shared is imported by now."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        listener.settimeout(1)
        os.write(1, READY)
        silent = os.open(os.devnull, os.O_WRONLY)  # who started this waits for its output's end
        os.dup2(silent, 1)
        os.close(silent)
        served: set[int] = set()
        begun = False
        while served or not begun:
            served = {pid for pid in served if os.waitpid(pid, os.WNOHANG) == (0, 0)}
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                begun = True
                if (pid := os.fork()) == 0:
                    listener.close()
                    os._exit(handle(connection, jobs))
                served.add(pid)
                connection.close()


def handle(connection: socket.socket, jobs: Handler) -> int:
    """Serve one connection; returns the exit code of the process that does."""
    connection.sendall(READY)
    asks = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    kind, fds, _, _ = socket.recv_fds(connection, 1, 3)
    if kind == b"j":
        return jobs(connection)
    with connection.makefile("rb", buffering=0) as lines:  # signals may come behind the line
        job = json.loads(lines.readline())
    if (pid := os.fork()) == 0:
        connection.close()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        enter_host(asks)
        os._exit(become_python(**job))
    for fd in fds:
        os.close(fd)
    connection.sendall(accompany(pid, connection).to_bytes(4, "little"))
    return 0


def enter_host(pid: int) -> None:
    """Enter the namespaces of a process: on the hosts of tests/cluster it has another network, name
    and other files."""
    for kind in ("net", "uts", "mnt"):
        there = f"/proc/{pid}/ns/{kind}"
        if os.readlink(there) != os.readlink(f"/proc/self/ns/{kind}"):
            with open(there) as namespace:
                os.setns(namespace.fileno())


def accompany(pid: int, connection: socket.socket) -> int:
    """Hand signals on to a process, SIGKILL where who asked for it is gone; its wait status."""
    process = os.pidfd_open(pid)
    while True:
        ready, _, _ = select.select([process, connection], [], [])
        if process in ready:
            return os.waitpid(pid, 0)[1]
        number = connection.recv(1)
        os.kill(pid, number[0] if number else signal.SIGKILL)
        if not number:
            os.waitpid(pid, 0)
            os._exit(0)


PATH = sys.path[1 + len(ENV["PYTHONPATH"].split(os.pathsep)) :]
"""Of a Python without PYTHONPATH."""


def become_python(
    argv: list[str], env: dict[str, str], cwd: str, executable: str, blocked: list[int]
) -> int:
    """Become `python [-u] [-W ignore] ARGV`, of a script, `-m MODULE` or `-c TEXT`; returns the
    exit code."""
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    unbuffered = argv[0] == "-u" or bool(env.get("PYTHONUNBUFFERED"))
    argv = argv[argv[0] == "-u" :]
    if argv[:2] == ["-W", "ignore"]:
        warnings.simplefilter("ignore")
        argv = argv[2:]
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty(), write_through=unbuffered)
    sys.executable = executable
    kind = argv[0] if argv[0] in ("-m", "-c") else ""
    assert kind or not argv[0].startswith("-"), f"support/warm.py has no {argv[0]}"
    first = {"-m": cwd, "-c": ""}.get(kind, str(Path(argv[0]).resolve().parent))
    sys.path[:] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *PATH]
    sys.argv = argv[kind == "-m" :]
    if kind == "-c":
        sys.argv = ["-c", *argv[2:]]
        return ended(lambda: exec(argv[1], {"__name__": "__main__"}))
    if kind == "-m":
        return ended(lambda: runpy.run_module(argv[1], run_name="__main__", alter_sys=True))
    return ended(lambda: runpy.run_path(argv[0], run_name="__main__"))


def ended(program: Callable[[], object]) -> int:
    """Run a program to its end, as the interpreter does; returns the exit code."""
    try:
        program()
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    return code
