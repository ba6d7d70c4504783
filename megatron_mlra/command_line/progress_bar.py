"""The one progress bar of all tools: a bar on a terminal, a line every 30 s in a log."""

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
    """A tqdm bar on stderr.

    A log cannot overwrite a line. Where stderr is no terminal, a line is written at most once per
    `every` seconds, and none by work that takes less.

    Args:
        things: what to iterate over; None if the caller advances the bar by `update`.
        desc: name of the work (`scoring`).
        unit: what is counted, in the plural (`tokens`), or B for bytes.
        shown: whether to show anything.
        every: seconds between lines of a log.
        named: other arguments of tqdm.
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
    """A stream for tqdm that writes each state of the bar as a line."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if said := text.strip("\r\n "):
            self._stream.write(said + "\n")

    def flush(self) -> None:
        self._stream.flush()
