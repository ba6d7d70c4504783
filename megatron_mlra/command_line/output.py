"""Standard output and standard error, whose reader may leave before the program ends.

A write fails after `tool | head`, on a full disk, or in a terminal that was closed. Python would
end the program with a traceback, at the write or at exit. Here a tool exits cleanly. A training run
goes on: a lost terminal must not cost a checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys

from megatron_mlra.command_line.printable import printable

CODE = 128 + signal.SIGPIPE
"""Exit code when the reader of the output leaves first: a shell's code for SIGPIPE."""
_STREAMS = {1: "stdout", 2: "stderr"}
_ending = False
"""Whether the program ends when its standard output cannot be written."""


class _Stream(io.FileIO):
    """An unbuffered standard stream. SIGPIPE stays ignored, as Python has it: its default action
    would also end a tool whose worker process died."""

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            # Python writes the buffered rest again at exit; that write must not fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if _ending and self.fileno() == 1:
                _end(error)
            return len(data)


def _end(error: OSError) -> None:
    """End by SystemExit: tools report an OSError as bad input."""
    if isinstance(error, BrokenPipeError):
        raise SystemExit(CODE) from None
    say_error(f"error: standard output: {error.strerror}")
    raise SystemExit(1) from None


def guard(ending: bool) -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams whose writes do not raise OSError. For
    programs, not for libraries.

    Args:
        ending: whether the program ends, by SystemExit, when its standard output cannot be written;
            else later output is dropped.
    """
    global _ending
    _ending = ending
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # The parent process closed it. The next file that is opened would get this number, and
            # with it the output of C libraries.
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
    """Write one line to standard error, past Python's streams, from any thread. The text may come
    from a file or another host: unprintable letters are escaped."""
    with contextlib.suppress(OSError):
        os.write(2, f"{printable(line)}\n".encode())
