"""Pieces of sequences that a step takes, and the checks of those that a caller hands to `Runner`.

An id or a position out of range would read or write memory of others: on a CPU some are taken in
silence, on a GPU the device is lost. So a step is checked before any of it reaches the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_mlra.inference.checks import ids, shown, whole


@dataclass
class Chunk:
    """The next tokens of one sequence."""

    tokens: list[int]
    start: int
    """Tokens of the sequence that are cached before this chunk."""
    pages: list[int]
    """Page ids of the whole sequence, on all ranks."""


def last_rows(chunks: Iterable[Chunk]) -> list[int]:
    """The row of each chunk's last token, where the chunks' rows follow one another."""
    return [end - 1 for end in itertools.accumulate(len(chunk.tokens) for chunk in chunks)]


@dataclass(frozen=True)
class Limits:
    """What the chunks of a step may hold.

    Args:
        vocab: size of the vocabulary.
        positions: tokens of the longest sequence.
        page_size: tokens of a page.
        pages: page ids of the cache, on all ranks.
        sequence_pages: pages of the longest sequence, on all ranks.
        sequences: sequences of a decoding step.
    """

    vocab: int
    positions: int
    page_size: int
    pages: int
    sequence_pages: int
    sequences: int

    def checked(
        self, chunks: Any, least: int = 1, most: int | None = None, decoding: bool = False
    ) -> list[Chunk]:
        """`chunks` as lists of ints; numpy's and torch's arrays of integers count as lists.

        Of a decoding step's pages only those that it writes are checked: a long sequence has
        thousands, which were checked when its prompt was cached or its block table was set.

        Args:
            least, most: tokens of a chunk.

        Raises:
            ValueError: what does not fit; the message names the sequence, the value and the limit.
        """
        if not isinstance(chunks, list | tuple) or not chunks:
            raise ValueError(f"the chunks are {shown(chunks)}; give a list of at least one Chunk")
        if decoding and len(chunks) > self.sequences:
            raise ValueError(
                f"{len(chunks)} sequences in one step, the runner takes {self.sequences};"
                f" use Runner(max_batch={len(chunks)})"
            )
        found = [self._chunk(i, chunk, least, most, decoding) for i, chunk in enumerate(chunks)]
        written: dict[int, int] = {}
        for i, chunk in enumerate(found):
            for page in self._written(chunk):
                if written.setdefault(page, i) != i:
                    raise ValueError(
                        f"sequences {written[page]} and {i} of the step both write to page {page};"
                        f" give each pages of its own"
                    )
        return found

    def _chunk(self, at: int, chunk: Any, least: int, most: int | None, decoding: bool) -> Chunk:
        if not isinstance(chunk, Chunk):
            raise ValueError(
                f"chunk of sequence {at} is {shown(chunk)}; give a Chunk(tokens, start, pages)"
            )
        tokens = _ids("token", at, chunk.tokens, self.vocab)
        _whole("number of tokens in the step", at, len(tokens), least, most)
        start = _whole("number of cached tokens", at, chunk.start)
        pages, end = chunk.pages, start + len(tokens)
        if end > self.positions:
            raise ValueError(
                f"{end} tokens of sequence {at} are more than the {self.positions} positions of the"
                " model and its cache; use a shorter sequence, or LoadOptions(max_positions=...,"
                " cache_tokens=...)"
            )
        if not (decoding and type(pages) is list):
            pages = _ids("page", at, pages, self.pages)
        if len(pages) > self.sequence_pages:
            raise ValueError(
                f"{len(pages)} pages of sequence {at}, the runner takes {self.sequence_pages} a"
                f" sequence; use Runner(max_pages={len(pages)})"
            )
        needed = max(1, -(-end // self.page_size))
        if needed > len(pages):
            raise ValueError(
                f"{end} tokens of sequence {at} need {needed} pages of {self.page_size}, it has"
                f" {len(pages)}"
            )
        checked = Chunk(tokens, start, pages)
        if decoding:
            _ids("page", at, [pages[0], *self._written(checked)], self.pages)
        return checked

    def _written(self, chunk: Chunk) -> list[int]:
        """The pages that a chunk's tokens are cached in."""
        end = chunk.start + len(chunk.tokens)
        return chunk.pages[chunk.start // self.page_size : -(-end // self.page_size)]


# A decoding step checks some numbers of every sequence. Names are made for errors alone.


def _whole(name: str, at: int, value: Any, least: int = 0, most: int | None = None) -> int:
    if type(value) is int and value >= least and (most is None or value <= most):
        return value
    return whole(f"{name} of sequence {at}", value, least, most)


def _ids(name: str, at: int, values: Any, count: int) -> list[int]:
    """`values` as a list of ints in [0, count)."""
    if type(values) is list:
        for value in values:
            if type(value) is not int or not 0 <= value < count:
                break
        else:
            return values
    found = ids(f"{name}s of sequence {at} are", values)
    return [_whole(name, at, value, 0, count - 1) for value in found]
