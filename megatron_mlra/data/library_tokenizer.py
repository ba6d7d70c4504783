"""Untrusted `tokenizer.json` files: limits on the growth of a text, and errors of one kind."""

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
"""Largest factor by which all replacements of a tokenizer together may lengthen a text."""

_WIDENS = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "ByteLevel": 4, "BertNormalizer": 3}
"""Most letters that one letter becomes. Normalising a text (`_NORMAL`) a second time in a row does
not lengthen it; writing it as bytes a second time does."""
_NORMAL = ("NFC", "NFD", "NFKC", "NFKD", "Precompiled")

_CLASS = re.compile(r"\\[pP]\{[^{}]*\}")
"""A class of Unicode letters, which Python's regular expressions lack."""


@contextlib.contextmanager
def ordinary_errors(what: str) -> Iterator[None]:
    """Turn the errors of the `tokenizers` library into input errors.

    A panic of its Rust code (a regular expression that backtracks too often) is a `BaseException`
    that `except Exception` would not catch. The library's other errors are plain `Exception`.

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
    """Refuse a `tokenizers.Tokenizer` that expands a short text to gigabytes.

    Raises:
        InputError: its normalizer, pre-tokenizer or decoder lengthens texts more than `MOST_GROWTH`
            times.
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
    """The largest factor by which each part lengthens a text, in order of application."""
    normal = 1
    for kind, each in _flat(part):
        if kind in _NORMAL:
            factor = _precompiled(each) if kind == "Precompiled" else _WIDENS[kind]
            # Consecutive normalisations together count as the widest of them.
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
    """(type, part) of every nested part, innermost first."""
    if not isinstance(part, dict):
        return
    for name in ("normalizers", "pretokenizers", "decoders"):
        for inner in part.get(name, ()):
            yield from _flat(inner)
    yield str(part.get("type")), part


def _precompiled(part: dict) -> int:
    """The most letters that one letter becomes by a table of sentencepiece: 4 bytes with the size
    of a tree, the tree, then the replacements, each ended by a zero byte."""
    try:
        table = base64.b64decode(part["precompiled_charsmap"])
        texts = table[4 + int.from_bytes(table[:4], "little") :]
        return max(map(len, texts.decode("utf-8", errors="replace").split("\0")), default=1) or 1
    except (KeyError, TypeError, ValueError):
        return 1  # the library refuses such a table


def _replaced(pattern: dict[str, str], length: int) -> int:
    if "String" in pattern:
        found = len(pattern["String"])
        return max(1, -(-length // found)) if found else 1 + length
    return max(1, length) + (length if _may_be_empty(pattern["Regex"]) else 0)


def _may_be_empty(pattern: str) -> bool:
    """Whether a regular expression may match an empty text; True if unknown."""
    try:
        return re._parser.parse(_CLASS.sub("p", pattern)).getwidth()[0] == 0
    except Exception:  # another dialect than Python's, or nested too deeply
        return True
