"""The one progress bar of all tools: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_PER_LINE = 30.0


def bar(
    things: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    shown: bool = True,
    every: float = SECONDS_PER_LINE,
    **named: Any,
) -> tqdm:
    """tqdm on stderr, which says what is done and what is counted.

    Where stderr is no terminal, a carriage return would not bring the cursor back: a log gets a
    line at most every `every` seconds, and nothing of what ends sooner.

    Args:
        things: what to go through, if it is not told by `update`.
        desc: what is done (`scoring`).
        unit: what is counted, in the plural (`tokens`), or B.
        shown: whether to show anything.
        named: of tqdm.
    """
    named |= {"desc": desc, "unit": unit if unit == "B" else f" {unit}", "disable": not shown}
    counted = "{n_fmt}/{total_fmt}{unit}"
    if sys.stderr.isatty():
        form = f"{{l_bar}}{{bar}}| {counted} [{{elapsed}}<{{remaining}}, {{rate_fmt}}]"
        return tqdm(things, mininterval=0.5, bar_format=form, **named)
    lines = _Lines(sys.stderr)
    return tqdm(
        things,
        file=lines,
        mininterval=every,
        maxinterval=every,
        miniters=1,
        delay=every,
        ncols=100,
        bar_format=f"{{l_bar}} {counted} | {{elapsed}} < {{remaining}}",
        leave=False,
        **named,
    )


class _Lines:
    """A stream for tqdm: each state of the bar on a line of its own."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if said := text.strip("\r\n "):
            self._stream.write(said + "\n")

    def flush(self) -> None:
        self._stream.flush()
