"""Types of a parser's arguments: numbers with bounds, refused while the command line is parsed.

add("--steps", type=whole(1), ...)          argument --steps: 0 is no whole number of at least 1
add("--max-mb", type=real(above=0), ...)    argument --max-mb: inf is no number above 0
"""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable

MOST_PROCESSES = 1024
"""Most processes of one host. A larger number is a slip, and starting them would not end."""


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`, which a refusal names as the fix."""
    return max(n for n in range(1, min(number, most) + 1) if number % n == 0)


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type of whole numbers from `least` to `most`, both allowed."""
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least or (most is not None and value > most):
            raise ArgumentTypeError(f"{text:.60} is no whole number {bounds}")
        return value

    return convert


def real(
    least: float | None = None, above: float | None = None, most: float = math.inf
) -> Callable[[str], float]:
    """A type of finite numbers that are at least `least`, or above `above`, and at most `most`."""
    bounds = f"above {above:g}" if above is not None else f"of at least {least:g}"
    if most < math.inf:
        bounds += f" and at most {most:g}"

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        fits = value > above if above is not None else value >= least
        if not (math.isfinite(value) and fits and value <= most):
            raise ArgumentTypeError(f"{text:.60} is no number {bounds}")
        return value

    return convert
