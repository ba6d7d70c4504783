"""What a parser declares about the values of its arguments, checked before a command's body is
imported: a missing folder is refused in a fraction of a second, not behind the import of torch.

    reads(add("--text", nargs="+"), a_file)     a value that must be there
    writes(add("--json"), check_output)         a place for output, checked when all inputs are good
    parser.together.append(check_flags)         what several flags must fulfil together

A check is called as `check(value, flag)` and raises ValueError with one line. The readers of files
check again: a file may vanish, and a library's caller does not pass here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_mlra.command_line.parser import OneLineParser

Check = Callable[[Any, str], object]
_INPUT, _OUTPUT = 0, 1
EMPTY = "is given an empty name, as of a variable that is not set; name a place, or leave it out"


def reads(action: argparse.Action, check: Check) -> argparse.Action:
    """Declare how each value of an argument is checked."""
    action.early = (_INPUT, check)
    return action


def writes(action: argparse.Action, check: Check) -> argparse.Action:
    """Declare how the place of an output is checked; the check may make its folder."""
    action.early = (_OUTPUT, check)
    return action


def check(parser: OneLineParser, argv: Sequence[str], ranks: bool = True) -> None:
    """Parse a command line and check its values as the parser declares it.

    A parser's own answer (`--help`, an unknown flag) ends the program as ever.

    Args:
        parser: of a command; with `passes_on`, unknown flags and all words behind `--` belong to
            another program.
        ranks: whether several processes may run the command together.

    Raises:
        ValueError: one line that names the value and the fix.
    """
    if parser.passes_on:
        own = argv[: argv.index("--")] if "--" in argv else argv
        args = parser.parse_known_args(own)[0]
    else:
        args = parser.parse_args(argv)
    if not ranks:
        _check_alone()
    declared, written = list(_declared(parser, args)), {}
    for kind in (_INPUT, _OUTPUT):
        for action, (its_kind, function) in declared:
            if its_kind == kind:
                for value in _values(getattr(args, action.dest)):
                    _check_value(function, value, _name(action), action.const)
                    if kind == _OUTPUT:
                        _check_other(written, value, _name(action))
    for function in parser.together:
        function(args)


def _check_other(written: dict[str, str], value: Any, flag: str) -> None:
    """Refuse an output that would replace another of the same command line.

    Args:
        written: path -> flag of the outputs so far; this one is added.

    Raises:
        ValueError: names both flags and the value.
    """
    if (other := written.setdefault(os.path.realpath(value), flag)) != flag:
        raise ValueError(f"{other} and {flag} are both {value}; name two files")


def _check_alone() -> None:
    """Refuse to run as one of several ranks, which would all do the same work and write the same
    files. A job's shell may have WORLD_SIZE without being a rank: Kubernetes sets it for the pod.

    Raises:
        ValueError: one line that names the number of ranks and the fix.
    """
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1" and "LOCAL_RANK" in os.environ:
        raise ValueError(
            f"this command runs in one process, and WORLD_SIZE is {size}; start it without"
            " torchrun, or unset WORLD_SIZE"
        )


def _check_value(function: Check, value: Any, flag: str, alone: Any) -> None:
    """Check one value.

    Args:
        alone: the value of a flag that is given without one, which may be empty.

    Raises:
        ValueError: see the check; or the value is empty, or the system refuses to look at it.
    """
    if value == "" != alone:
        raise ValueError(f"{flag} {EMPTY}")
    with named(f"{flag} {value}"):
        function(value, flag)


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Turn an OSError into a ValueError that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{what}: {error.strerror or error}") from None


def _declared(
    parser: argparse.ArgumentParser, args: argparse.Namespace
) -> Iterator[tuple[argparse.Action, tuple[int, Check]]]:
    """The declared arguments of a parser and of the chosen subcommand's."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from _declared(action.choices[getattr(args, action.dest)], args)
        elif early := getattr(action, "early", None):
            yield action, early


def _values(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _name(action: argparse.Action) -> str:
    """What a message calls an argument: its first long flag, or the name that `--help` shows."""
    flags = [name for name in action.option_strings if name.startswith("--")]
    return flags[0] if flags else str(action.metavar or action.dest)


def no_check(value: Any, flag: str) -> None:
    """Of a value that may be anything but empty."""


def a_file(value: str | Path, flag: str) -> None:
    """Check that a file to read is there. It is not opened: it may be a pipe.

    Raises:
        ValueError: it is missing, a folder, or not readable.
    """
    where = f"{flag} {value}"
    try:
        if stat.S_ISDIR(os.stat(value).st_mode):
            raise ValueError(f"{where} is a folder; give a file")
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from None
    if not os.access(value, os.R_OK):
        raise ValueError(f"{where} cannot be read: its permissions forbid it")


def a_plain_file(value: str | Path, flag: str) -> None:
    """Check that a file that is read more than once is there. A pipe has its content once.

    Raises:
        ValueError: see `a_file`; or it is a pipe or a device.
    """
    a_file(value, flag)
    if not stat.S_ISREG(os.stat(value).st_mode):
        raise ValueError(f"{flag} {value} is no plain file, and is read more than once; copy it")


def a_folder(value: str | Path, flag: str, what: str = "a checkpoint's folder") -> None:
    """Check that a folder to read is there.

    Args:
        what: what to give, for the message.

    Raises:
        ValueError: it is missing, or no folder.
    """
    where = f"{flag} {value}" if flag.startswith("--") else str(value)
    if not Path(value).is_dir():
        raise ValueError(f"{where} is not a folder; give {what}")


def byte_or_there(value: str, flag: str) -> None:
    """Check that a tokenizer is `byte`, or a file or folder that is there.

    Raises:
        ValueError: there is no such file, or it cannot be looked at.
    """
    if value != "byte":
        is_there(value, flag, "byte, or a tokenizer's")


def is_there(value: str, flag: str, what: str) -> None:
    """Check that a file or folder is there.

    Args:
        what: what to give, for the message.

    Raises:
        ValueError: there is no such file, or it cannot be looked at.
    """
    try:
        os.stat(value)
    except FileNotFoundError:
        raise ValueError(f"{flag} {value}: no such file or folder; give {what}") from None
    except OSError as error:
        raise ValueError(f"{flag} {value}: {error.strerror}") from None
