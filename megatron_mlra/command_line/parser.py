"""What the command lines of tools/ share: errors of one line, whole files, a quiet end."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

CODE = 128 + signal.SIGPIPE
"""Exit code where the reader of the output leaves first, as SIGPIPE gives a program in a shell."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, ``error: ...``, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit."""
        self.exit(2, f"error: {message}\n")


def add_no_verify(parser: argparse.ArgumentParser) -> None:
    """Add the flag of all tools that read a checkpoint."""
    parser.add_argument(
        "--no-verify",
        action="store_false",
        dest="verify",
        help="read a checkpoint's files without comparing them with its checksums",
    )


def read_text(file: str | Path) -> str:
    """A UTF-8 text file.

    Raises:
        ValueError: it cannot be read; one line that names it.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None


def check_output(file: str | Path, flag: str) -> None:
    """Refuse, before any work, an output file that could not be written in the end.

    Raises:
        ValueError: one line that names the flag.
    """
    path = Path(file).absolute()
    if path.is_dir():
        raise ValueError(f"{flag} {file} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {file}: there is no folder {path.parent}; make it first")


def aside(path: str | Path) -> Path:
    """`path`, a name that only this program uses to write a file before it is renamed, made free.

    Of a link that lies there the link is removed, so that nothing is written where it points.

    Raises:
        OSError: a folder lies there.
    """
    path = Path(path)
    path.unlink(missing_ok=True)
    return path


def own_name(path: str | Path) -> Path:
    """A hidden name beside `path` that no other thread, process or host writes to: of hosts that
    share a folder, two processes may have one number."""
    path = Path(path)
    mine = f"{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}"
    return path.with_name(f".{path.name[:150]}.{hashlib.sha256(mine.encode()).hexdigest()[:16]}")


def write_text(file: str | Path, text: str) -> None:
    """Write aside, then rename: an interrupted run leaves no half file."""
    path = Path(file)
    partial = aside(own_name(path))
    try:
        with partial.open("x", encoding="utf-8") as opened:
            opened.write(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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


def say(line: str) -> None:
    """Print a line for a person, past the redirection of Megatron's output."""
    tqdm.write(line, file=sys.__stdout__)
    sys.__stdout__.flush()


def did_you_mean(name: str, known) -> str:
    """'; did you mean X?' for the known name nearest to `name`, '' where none is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def flag(name: str) -> str:
    """The flag of an argparse destination, for messages."""
    return "--" + name.replace("_", "-")
