"""Patterns of layers in Megatron's form, such as `([0]*3+[1])*6`.

Megatron evaluates them as Python. Here they are read, so a wrong one takes no memory and no time,
and needs no Megatron.
"""

from __future__ import annotations

import ast
import re
import warnings
from argparse import ArgumentTypeError

from megatron_mlra.description.model import MOST_LAYERS

FORM = "a number N, or a 0 or 1 for each layer, as ([0]*3+[1])*6"
_LONGEST = 4 * MOST_LAYERS
"""Most letters of a pattern."""


def layer_pattern(text: str) -> list[int] | int:
    """A pattern of layers, or a number.

    Raises:
        ArgumentTypeError: the text is neither; one line that quotes it.
    """
    text = text.strip()
    try:
        if re.fullmatch("[0-9]{1,9}", text) and 0 < int(text) <= MOST_LAYERS:
            return int(text)
        if len(text) <= _LONGEST and re.fullmatch(r"[][()+*,0-9 ]+", text):
            with warnings.catch_warnings(action="ignore"):  # of `[1](2)`, which is refused here
                return _bits(ast.parse(text, mode="eval").body)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        pass
    raise ArgumentTypeError(f"{text!r:.60} is not valid; use {FORM}")


def _bits(node: ast.expr) -> list[int]:
    """The zeros and ones of a list, a sum of lists, or a list times a number.

    Raises:
        ValueError: it is none of these, or empty, or longer than a model can be.
    """
    match node:
        case ast.List(elts=[_, *_] as each):
            found = [_number(bit, 1) for bit in each]
        case ast.BinOp(left, ast.Add(), right):
            found = _bits(left) + _bits(right)
        case ast.BinOp(left, ast.Mult(), ast.Constant() as times):
            found = _times(_bits(left), times)
        case ast.BinOp(ast.Constant() as times, ast.Mult(), right):
            found = _times(_bits(right), times)
        case _:
            raise ValueError
    if len(found) > MOST_LAYERS:
        raise ValueError
    return found


def _times(bits: list[int], node: ast.Constant) -> list[int]:
    count = _number(node, MOST_LAYERS)
    if not 0 < count * len(bits) <= MOST_LAYERS:
        raise ValueError
    return bits * count


def _number(node: ast.expr, most: int) -> int:
    match node:
        case ast.Constant(value) if type(value) is int and 0 <= value <= most:
            return value
    raise ValueError
