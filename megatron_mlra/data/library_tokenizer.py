"""A stranger's `tokenizer.json` and the library that runs it: bounded growth, ordinary errors."""

from __future__ import annotations

import base64
import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

from megatron_mlra.command_line.foreign_text import parse_json
from megatron_mlra.data.errors import InputError, first_line

MOST_GROWTH = 100
"""Times that the replacements of a tokenizer may lengthen a text, one after the other."""

_WIDENS = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "ByteLevel": 4, "BertNormalizer": 3}
"""Letters that one letter may become. A text that is normalised twice is as long as after once,
until something else changes it; one that is written as bytes twice is not."""
_NORMAL = ("NFC", "NFD", "NFKC", "NFKD", "Precompiled")

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
    for what in ("normalizer", "pre_tokenizer", "decoder"):
        part = getattr(tokenizer, what)
        if part is None:
            continue
        try:
            growth = math.prod(_factors(parse_json(part.__getstate__().decode())))
        except ValueError as error:
            raise InputError(f"its {what} cannot be read ({error})") from None
        if growth > MOST_GROWTH:
            raise InputError(
                f"its {what} can make a text {growth:,} times as long (at most {MOST_GROWTH});"
                " use another tokenizer"
            )


def _factors(part: Any) -> Iterator[int]:
    """How many times as long a text may become by each part that is one alone, in order."""
    normal = 1
    for kind, each in _flat(part):
        if kind in _NORMAL:
            factor = _precompiled(each) if kind == "Precompiled" else _WIDENS[kind]
            # Behind one another they count as the widest of them.
            yield -(-max(normal, factor) // normal)
            normal = max(normal, factor)
            continue
        if kind == "Replace":
            yield _replaced(each["pattern"], len(each["content"]))
        elif kind == "Prepend":
            yield 1 + len(each.get("prepend", ""))
        elif kind in _WIDENS:
            yield _WIDENS[kind]
        else:
            continue
        normal = 1


def _flat(part: Any) -> Iterator[tuple[str, dict]]:
    """The parts within a part, and within those, by their type."""
    if not isinstance(part, dict):
        return
    for name in ("normalizers", "pretokenizers", "decoders"):
        for inner in part.get(name, ()):
            yield from _flat(inner)
    yield str(part.get("type")), part


def _precompiled(part: dict) -> int:
    """The most letters that a table of sentencepiece's writes for one: its texts lie behind its
    tree, each with a zero at its end."""
    try:
        table = base64.b64decode(part["precompiled_charsmap"])
        texts = table[4 + int.from_bytes(table[:4], "little") :]
        return max(map(len, texts.decode("utf-8", errors="replace").split("\0")), default=1) or 1
    except (KeyError, TypeError, ValueError):
        return 1  # the library refuses it


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
