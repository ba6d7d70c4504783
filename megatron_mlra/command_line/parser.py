"""What all command lines share: help, one-line errors, files that are whole or absent, the exit."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import signal
import sys
import tempfile
import textwrap
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from megatron_mlra.command_line.output import guard
from megatron_mlra.command_line.printable import printable
from megatron_mlra.command_line.ranks import say_refusal
from megatron_mlra.command_line.suggest import refusal
from megatron_mlra.version import __version__, installed

LONGEST = 1500
"""Most letters of an error. A message may quote a value of megabytes from a file."""
TEXT_BYTES = 512 << 20
"""Most bytes of a text file that a command reads into memory."""
_BLOCK = 4096
"""Bytes of a file that a disk is tried with, the least that most file systems give to one."""
_PROCESS = uuid.uuid4().hex
"""Identifies this process and its forks among those of all hosts and containers."""


class HelpFormatter(argparse.HelpFormatter):
    """Help that does not break flags at their dashes, and whose texts may contain a bare `%`, which
    argparse would take for the start of a field."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """A description of several lines keeps its line breaks."""
        lines = text.splitlines() if "\n" in text else self._split_lines(text, width)
        return "\n".join(indent + line for line in lines)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except (KeyError, TypeError, ValueError):
            action.help = re.sub(r"%(?!\(\w+\)[a-z])", "%%", action.help)
            return super()._expand_help(action)


class Version(argparse.Action):
    """`--version`: one line of versions, found without importing the packages."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        suppress = argparse.SUPPRESS
        super().__init__(option_strings, dest=suppress, default=suppress, nargs=0, help=help)

    @staticmethod
    def text() -> str:
        """The versions of this package, of megatron-core and of torch."""
        found = {"megatron-mlra": __version__, **installed("megatron-core", "torch")}
        return ", ".join(f"{name} {version}" for name, version in found.items())

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(self.text())
        parser.exit()


class OneLineParser(argparse.ArgumentParser):
    """A parser with `--version`, whose errors are one line, ``error: ...``, with exit code 2.

    An unknown flag is reported before all other errors, with the known flag that is most alike.

    Attributes:
        passes_on: whether unknown flags belong to another program, which the command starts.
        together: checks of all arguments at once, see early.py.
    """

    _strict = False

    def __init__(
        self, *args: Any, add_version: bool = True, passes_on: bool = False, **named: Any
    ) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, "allow_abbrev": False} | named)
        self.passes_on = passes_on
        self.together: list[Callable[[argparse.Namespace], object]] = []
        if add_version:
            self.add_argument("--version", action=Version, help="print the versions and exit")

    def error(self, message: str) -> NoReturn:
        """Print the message as one line, and exit with code 2."""
        said = refusal(message, self._option_string_actions)
        if self.passes_on and message.startswith("unrecognized arguments: -"):
            said += "; flags of the program that is started go behind --"
        self.exit(fail(said, 2))

    def parse_args(self, args=None, namespace=None):
        """As argparse's, but unknown flags are refused first, those of subcommands too."""
        self._be_strict()
        return super().parse_args(args, namespace)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's."""
        words = sys.argv[1:] if args is None else list(args)
        takes_rest = any(
            action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions
        )
        if self._strict and not takes_rest:
            for word in words[: words.index("--") if "--" in words else None]:
                name = word.partition("=")[0]
                # argparse accepts a flag's unique prefix.
                known = any(option.startswith(name) for option in self._option_string_actions)
                if re.match("--[a-zA-Z]", name) and not known:
                    self.error(f"unrecognized arguments: {name}")
        return super().parse_known_args(words, namespace)

    def _be_strict(self) -> None:
        self._strict = True
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for below in action.choices.values():
                    if isinstance(below, OneLineParser):
                        below._be_strict()


def one_line(error: BaseException | str) -> str:
    """An error in one line of at most `LONGEST` letters. The middle of a longer message is left
    out: a long value nearly always stands between its name and the fix."""
    line = printable(" ".join(str(error).split()))
    if len(line) <= LONGEST:
        return line
    head, tail = 2 * LONGEST // 3, LONGEST // 3 - 50
    left_out = len(line) - head - tail
    return f"{line[:head]} ... ({left_out:,} letters left out) ... {line[-tail:]}"


def fail(message: str, code: int) -> int:
    """Print a one-line error to standard error, and return the exit code. Of ranks see ranks.py."""
    say_refusal(one_line(message), code)
    return code


def add_no_verify(parser: argparse.ArgumentParser) -> None:
    """Add `--no-verify`, which all tools that read a checkpoint have."""
    parser.add_argument(
        "--no-verify",
        action="store_false",
        dest="verify",
        help="read a checkpoint's files without comparing them with its checksums",
    )


def read_text(file: str | Path, errors: str = "strict", newline: str | None = None) -> str:
    """The content of a UTF-8 text file, without a mark of the byte order in front of it.

    Args:
        errors: what is done with other bytes, as in `bytes.decode`.
        newline: as in `open`. None: every end of a line is \\n. "": they stay as they are, for text
            that a model reads, since `mlra preprocess` trains on them as they are.

    Raises:
        ValueError: the file cannot be read, or has more than `TEXT_BYTES`; one line that names it.
    """
    try:
        with open(file, "rb") as stream:  # a pipe or a device may never end
            read = stream.read(TEXT_BYTES + 1)
        if len(read) > TEXT_BYTES:
            raise ValueError(f"{file} has more than {TEXT_BYTES / 1e6:,.0f} MB; give a part of it")
        return io.TextIOWrapper(io.BytesIO(read), "utf-8-sig", errors, newline).read()
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None


def lines_of(file: str | Path) -> list[str]:
    """The lines of `read_text`. Only ends of lines cut: JSON allows the other characters at which
    `str.splitlines` cuts, such as U+2028, inside a string.

    Raises:
        ValueError: see `read_text`.
    """
    return read_text(file).split("\n")


def check_output(file: str | Path, flag: str) -> None:
    """Make the folder of an output file, so that a path that cannot be written fails before any
    work.

    Raises:
        ValueError: the file cannot be written; one line that names the flag.
    """
    path = Path(file).absolute()
    try:
        if path.is_dir():
            raise ValueError(f"{flag} {file} is a folder; name a file in it")
        if path.exists() and not path.is_file():  # which a file would be put in the place of
            raise ValueError(f"{flag} {file} is no plain file; name another")
    except OSError as error:
        raise ValueError(f"{flag} {file} cannot be written ({error.strerror})") from None
    make_folder(path.parent, f"{flag} {file}")


def make_folder(folder: str | Path, what: str) -> None:
    """Make a folder for output and its missing parents.

    Raises:
        ValueError: the folder cannot be made or written into; one line that begins with `what`.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{what}: the folder {folder} cannot be made ({error.strerror})") from None
    try:
        try_writing(folder)
    except OSError as error:
        raise ValueError(
            f"{what}: the folder {folder} cannot be written ({error.strerror}); use another"
        ) from None


def check_writable(folder: str | Path, what: str) -> Path:
    """Check that a folder, which need not exist, can be written; nothing is made.

    Returns:
        The nearest folder above it that exists, or the folder itself.

    Raises:
        ValueError: the folder cannot be written; one line that begins with `what`.
    """
    existing = Path(folder)
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"{what} cannot be written: {existing} is not a folder")
    try:
        try_writing(existing)
    except OSError as error:
        raise ValueError(
            f"{what} cannot be written ({error.strerror}); use another folder"
        ) from None
    return existing


def try_writing(folder: str | Path) -> None:
    """Ask the file system itself: permission bits say nothing about a read-only mount, and a full
    disk still makes empty files.

    Raises:
        OSError: no file can be written in this folder.
    """
    with tempfile.TemporaryFile(dir=folder, buffering=0) as tried:
        tried.write(bytes(_BLOCK))


def aside(path: str | Path) -> Path:
    """Remove any file at `path`, a temporary name that only this program uses, and return `path`.

    A symbolic link is removed itself: nothing is written to its target.

    Raises:
        OSError: `path` is a folder.
    """
    path = Path(path)
    path.unlink(missing_ok=True)
    return path


def own_name(path: str | Path) -> Path:
    """A hidden name beside `path` that no other thread, process or host uses. Host name and process
    id alone do not suffice: containers that share a folder may have both in common."""
    path = Path(path)
    mine = f"{_PROCESS}-{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}"
    return path.with_name(f".{path.name[:150]}.{hashlib.sha256(mine.encode()).hexdigest()[:16]}")


@contextlib.contextmanager
def written_whole(file: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `file`, to be written in the block and then renamed to `file`. An
    error or an interrupt leaves no partial file.

    Raises:
        OSError: writing failed; it names `file`.
    """
    path = Path(file)
    partial = aside(own_name(path))
    try:
        yield partial
        partial.replace(path)
    except OSError as error:  # of a full disk, which names no file, or the temporary one
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def write_text(file: str | Path, text: str) -> None:
    """Write a text file whole or not at all, see `written_whole`."""
    with written_whole(file) as partial, partial.open("x", encoding="utf-8") as opened:
        opened.write(text)


def write_json(file: str | Path, value: Any, indent: int | None = None) -> None:
    """Write a value as JSON and a line end, see `written_whole`."""
    write_text(file, json.dumps(value, indent=indent) + "\n")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool's `main` and exit with its code. Ctrl-C ends the tool with one line."""
    guard(ending=True)
    try:
        code = main()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.stdout.flush()
    sys.exit(code)


def say(line: str) -> None:
    """Print lines for the user, past the redirection of Megatron's output."""
    tqdm.write(printable(line, kept="\n\t\xa0"), file=sys.__stdout__)
    sys.__stdout__.flush()


def flags_given(argv: list[str]) -> set[str]:
    """The flags on a command line, without values, whether those follow `=` or a space."""
    return {word.partition("=")[0] for word in argv if word.startswith("--")}


def flag(name: str) -> str:
    """The flag of an argparse destination, for messages: `save_interval` -> `--save-interval`."""
    return "--" + name.replace("_", "-")
