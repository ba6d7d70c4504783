"""Checks of the numbers that callers hand to the inference code."""

from __future__ import annotations

import operator
from typing import Any

import torch

FLOAT32 = torch.finfo(torch.float32)


def shown(value: Any) -> str:
    """`value` for a message, in at most 60 letters; of an unprintable object, its type."""
    try:
        return f"{value!r:.60}"
    except Exception:  # For example, an int of 10,000 digits.
        return f"a {type(value).__name__} too long to print"


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """`value` as an int; numpy's and torch's integers count, floats and booleans do not.

    Args:
        name: what the value is, for the error.
        least, most: the bounds, both allowed.

    Raises:
        ValueError: the message names the value and the allowed ones.
    """
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError):
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise ValueError(f"{name} is {shown(value)}; use a whole number {bounds}")
    return number


def ids(which: str, values: Any, of: str = "ids") -> list[Any]:
    """`values` as a list, whose items are not checked; text counts as no list.

    Raises:
        ValueError: nothing to iterate over; the message names the value.
    """
    try:
        found = None if isinstance(values, str | bytes) else list(values)
    except TypeError:  # no iterable, or a tensor of no dimensions
        found = None
    if found is None:
        raise ValueError(f"{which} {shown(values)}; give a list of {of}")
    return found


def real(name: str, value: Any, fix: str) -> float:
    """`value` as a float that float32 holds: 0, or from 1.2e-38 to 3.4e38 in magnitude.

    Args:
        fix: what to use instead, for the error.

    Raises:
        ValueError: not a number, NaN, infinite, or nothing but 0 or infinity in float32.
    """
    try:
        number = None if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = None
    if number is None or not (number == 0 or FLOAT32.tiny <= abs(number) <= FLOAT32.max):
        raise ValueError(f"{name} is {shown(value)}; use {fix}")
    return number
