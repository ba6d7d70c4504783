"""Text that grows token by token."""

from __future__ import annotations

from collections.abc import Callable

UNFINISHED = "\ufffd"
"""What bytes that are no whole character decode to."""


class GrowingText:
    """Text of a request's output, handed out as it becomes certain."""

    def __init__(self, detokenize: Callable[[list[int]], str]) -> None:
        self._detokenize = detokenize
        self._given = ""

    def more(self, ids: list[int], last: bool = False) -> str:
        """What `ids` (all so far) add; a character cut in half waits for its rest."""
        text = self._detokenize(ids)
        if not last:
            text = text.rstrip(UNFINISHED)
        if not text.startswith(self._given):
            # A tokenizer that rewrites earlier text: wait until it agrees again.
            return ""
        added, self._given = text[len(self._given) :], text
        return added
