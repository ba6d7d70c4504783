"""A stranger's `tokenizer.json` and the library that runs it: bounded growth, ordinary errors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from megatron_mlra.command_line.foreign_text import parse_json
from megatron_mlra.data.errors import InputError, first_line

MOST_GROWTH = 100
"""Times that the replacements of a tokenizer may lengthen a text, one after the other."""

_CLASS = re.compile(r"\\[pP]\{[^{}]*\}")
"""A class of Unicode, which Python's own expressions lack."""


@contextlib.contextmanager
def ordinary_errors(what: str) -> Iterator[None]:
    """Have the library's errors be input errors.

    A panic of its Rust code, as of a regular expression that backtracks too often, is no
    `Exception`, and would pass every `except`; its other errors are plain `Exception`.

    Raises:
        InputError: one line that begins with `what`.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__module__ != "pyo3_runtime":
            raise
        raise InputError(f"{what}: {first_line(error)}") from None


def check_growth(tokenizer: Any) -> None:
    """Refuse a `tokenizers.Tokenizer` that makes gigabytes of a short text.

    Raises:
        InputError: what comes before or behind the model replaces by too much.
    """
    for what in ("normalizer", "decoder"):
        part = getattr(tokenizer, what)
        if part is None:
            continue
        try:
            growth = _growth(parse_json(part.__getstate__().decode()))
        except ValueError as error:
            raise InputError(f"its {what} cannot be read ({error})") from None
        if growth > MOST_GROWTH:
            raise InputError(
                f"its {what} can make a text {growth:,} times as long (at most {MOST_GROWTH});"
                " use another tokenizer"
            )


def _growth(part: Any) -> int:
    """How many times as long a text may become by a part and those within it."""
    growth = 1
    if not isinstance(part, dict):
        return growth
    for inner in (*part.get("normalizers", ()), *part.get("decoders", ())):
        growth *= _growth(inner)
    if part.get("type") == "Replace":
        growth *= _replaced(part["pattern"], len(part["content"]))
    return growth


def _replaced(pattern: dict[str, str], length: int) -> int:
    if "String" in pattern:
        found = len(pattern["String"])
        return max(1, -(-length // found)) if found else 1 + length
    return max(1, length) + (length if _may_be_empty(pattern["Regex"]) else 0)


def _may_be_empty(pattern: str) -> bool:
    """Whether a regular expression may match between two letters; True where that is unknown."""
    try:
        return re._parser.parse(_CLASS.sub("p", pattern)).getwidth()[0] == 0
    except Exception:  # of another dialect, or nested too deeply
        return True
