"""Text that grows token by token."""

from __future__ import annotations

from collections.abc import Callable

UNFINISHED = "\ufffd"
"""The character that bytes of an unfinished character decode to."""


class GrowingText:
    """Text of a request's output, handed out once later tokens cannot change it."""

    def __init__(self, detokenize: Callable[[list[int]], str]) -> None:
        self._detokenize = detokenize
        self._given = ""

    def more(self, ids: list[int], last: bool = False) -> str:
        """The text that `ids` (all so far) add to the text handed out before.

        Bytes of an unfinished character wait for the rest, except when `last` is set.
        """
        text = self._detokenize(ids)
        if not last:
            text = text.rstrip(UNFINISHED)
        if not text.startswith(self._given):
            # The tokenizer has rewritten earlier text: wait until both agree again.
            return ""
        added, self._given = text[len(self._given) :], text
        return added
