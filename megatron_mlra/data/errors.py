"""Errors of preprocessing that a user can mend."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """An argument or an input file is wrong; the message is one line and says what to change."""


class BadRecordError(InputError):
    """A record inside an input is wrong; the message starts with ``file:line``."""


def require(module: str, purpose: str) -> ModuleType:
    """Import a module of an optional package, whose name on PyPI is that of its top-level module.

    Raises:
        InputError: the package is not installed; the message gives the pip command.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{purpose} needs the package {package}: run `pip install {package}`"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, or the error's type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
