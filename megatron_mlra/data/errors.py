"""What a user of the preprocessing can get wrong."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """An argument or an input file is wrong; the message is one line and says what to change."""


class BadRecordError(InputError):
    """A record inside an input is wrong; the message starts with ``file:line``."""


def require(module: str, purpose: str) -> ModuleType:
    """Import a module of an optional package; the package is called as its top-level module.

    Raises:
        InputError: it is not installed; the message names the pip command.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{purpose} needs the package {package}: run `pip install {package}`"
        ) from error


def first_line(error: BaseException) -> str:
    """The message of an exception of another library, cut to one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
