"""The line that training prints per logged step: its layout for a width, and its parser.

`step 310/320 | lm loss 1.4916 | grad norm 0.800 | lr 1.05e-04 | 892 tokens/s | 0.4 GiB | 11 s left`

A line wider than the terminal, or than 100 columns, is broken: speed, memory and time left come on
an indented second line.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from typing import NamedTuple, TextIO

WIDEST = 100
"""Most columns of a line."""

STEP = re.compile(r"^step ([\d,]+)/([\d,]+) \| lm loss ([\d.]+|nan|inf)", re.MULTILINE)
_RATE = re.compile(r"([\d,]+) tokens/s")
_INDENT = "  "
_BETWEEN = " | "


class LogLine:
    """Lays out the lines of a run. After the first line that had to be broken, all are broken."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.__stdout__ if stream is None else stream
        self.stacked = False

    def width(self) -> int:
        """Columns to fill: those of the terminal, at most `WIDEST`."""
        if not self.stream.isatty():
            return WIDEST
        return min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)

    def __call__(self, *groups: list[str], growth: int = 0) -> str:
        """The groups' parts on one line, or one line per group where one line is too wide.

        Args:
            growth: columns by which a later line of the run may be longer than this one.
        """
        width = self.width()
        groups = [group for group in groups if group]
        line = _BETWEEN.join(part for group in groups for part in group)
        self.stacked = self.stacked or len(line) + growth > width
        if not self.stacked:
            return line
        lines: list[str] = []
        for group in groups:
            lines.append("")
            for part in group:
                longer = lines[-1] + (_BETWEEN if lines[-1].strip() else "") + part
                if lines[-1].strip() and len(longer) > width:
                    lines.append(_INDENT + part)
                else:
                    lines[-1] = longer if lines[-1] or len(lines) == 1 else _INDENT + part
        return "\n".join(lines)


def duration(seconds: float) -> str:
    """A time for a person: '75 s', '48 min', '19 h 51 min', '3 d 4 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 36 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


class LoggedStep(NamedTuple):
    """The values of one logged line."""

    step: int
    loss: float
    """Mean over the steps since the previous line."""
    tokens_per_second: int | None


def logged_steps(text: str) -> Iterator[LoggedStep]:
    """The logged steps in the output of a run, in the order of their lines."""
    lines: list[str] = []
    for line in text.splitlines():
        if STEP.match(line):
            lines.append(line)
        elif line.startswith(_INDENT) and lines:
            lines[-1] += _BETWEEN + line.strip()
    for line in lines:
        found, rate = STEP.match(line), _RATE.search(line)
        yield LoggedStep(
            int(found[1].replace(",", "")),
            float(found[3]),
            int(rate[1].replace(",", "")) if rate else None,
        )
