"""How the command lines of tools/ end when whoever reads their output leaves first."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

CODE = 128 + signal.SIGPIPE
"""Exit code then: a shell's, for a program that SIGPIPE ends."""


class _Stdout(io.FileIO):
    """Standard output that ends the program where there is nobody left to read (`tool | head`).

    By SystemExit and not BrokenPipeError, an OSError, which tools report as bad input. The signal
    is left as Python has it, since it would also end a tool whose worker process died.
    """

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            # What is still buffered is written once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            raise SystemExit(CODE) from None


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool's `main` and exit with its code."""
    old = sys.stdout
    buffer = io.BufferedWriter(_Stdout(old.fileno(), "w", closefd=False))
    sys.stdout = io.TextIOWrapper(
        buffer, encoding=old.encoding, errors=old.errors, line_buffering=old.isatty()
    )
    code = main()
    sys.stdout.flush()
    sys.exit(code)
