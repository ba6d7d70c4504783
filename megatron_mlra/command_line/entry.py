"""The first module of each program. It imports next to nothing, so that Ctrl-C is answered while
the rest is imported, as it is later: in one line, by exit code 130, and not by a traceback.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

INTERRUPTED = 130
"""128 + SIGINT. The module `signal` takes a while to import."""


class Answered:
    """A block that Ctrl-C ends with the program."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            os.write(2, b"error: interrupted\n")
            sys.exit(INTERRUPTED)


def main() -> NoReturn:
    """Run the program `mlra` on `sys.argv`, and exit."""
    with Answered():
        from megatron_mlra.command_line.commands import main

        main()


def run_command(name: str) -> NoReturn:
    """Run one command on the flags of `sys.argv`, and exit."""
    with Answered():
        from megatron_mlra.command_line.commands import run_command

        run_command(name)
