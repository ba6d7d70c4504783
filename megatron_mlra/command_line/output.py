"""Standard output and standard error, whose reader may leave before the program ends.

`tool | head`, a full disk, a terminal that is closed under a run: a write then fails. Python would
end the program by a traceback, at the write or at its very end. Here a tool ends in order, and a
run that trains goes on: who reads along must not decide whether a checkpoint is written.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys

from megatron_mlra.command_line.printable import printable

CODE = 128 + signal.SIGPIPE
"""Exit code where the reader of the output leaves first, as SIGPIPE gives a program in a shell."""

_STREAMS = {1: "stdout", 2: "stderr"}
_ending = False
"""Whether the program ends once nobody reads its standard output."""


class _Stream(io.FileIO):
    """One of the two, unbuffered. The signal is left as Python has it, since it would also end a
    tool whose worker process died."""

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            # What is still buffered is written once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if _ending and self.fileno() == 1:
                _end(error)
            return len(data)


def _end(error: OSError) -> None:
    """By SystemExit and not by an OSError, which tools report as bad input."""
    if isinstance(error, BrokenPipeError):
        raise SystemExit(CODE) from None
    say_error(f"error: standard output: {error.strerror}")
    raise SystemExit(1) from None


def guard(ending: bool) -> None:
    """Have this process's two streams outlive their reader; for programs, not for libraries.

    Args:
        ending: the program ends, by SystemExit, once its standard output cannot be written; else it
            goes on without one.
    """
    global _ending
    _ending = ending
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # Closed by whoever started this program. Left free, the next file would be opened here,
            # and hold what a C library prints.
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    for fd, name in _STREAMS.items():
        old = getattr(sys, name)
        buffer = getattr(old, "buffer", None)
        if isinstance(getattr(buffer, "raw", buffer), _Stream):
            continue
        if old is not None:
            with contextlib.suppress(OSError, ValueError):
                old.flush()
        raw = _Stream(fd, "w", closefd=False)
        at_once = getattr(old, "write_through", False)  # python -u, as torchrun starts ranks
        stream = io.TextIOWrapper(
            raw if at_once else io.BufferedWriter(raw),
            encoding=getattr(old, "encoding", None) or "utf-8",
            errors=getattr(old, "errors", None) or "backslashreplace",
            line_buffering=os.isatty(fd) or fd == 2,
            write_through=at_once,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def say_error(line: str) -> None:
    """One line on standard error past Python's streams, from any thread, whoever wrote the text."""
    with contextlib.suppress(OSError):
        os.write(2, f"{printable(line)}\n".encode())
