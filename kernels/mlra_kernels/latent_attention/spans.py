"""Which queries read which keys, in the kernels' two forms: ranges of keys, or query tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

QUERIES = 128
"""Queries per program in both passes: two warpgroups take 64 each."""


def key_ranges(spans: Sequence[tuple[int, int, int, int]]) -> Tensor:
    """`ranges` of latent_attention, on the CPU.

    Args:
        spans: (first query, end of queries, first key, end of keys) each; together the spans cover
            the queries in order. The last query of a span reads all keys of the span, the query
            before it one key fewer, and so on.

    Returns:
        int32 `[2, s]`: first and last key of each query.

    Raises:
        ValueError: the spans do not cover the queries in order, a span has fewer keys than queries,
            or a query's first or last key lies before that of the query before.
    """
    _check_spans(spans)
    first = [torch.full((b - a,), start) for a, b, start, _ in spans]
    last = [torch.arange(a - b, 0) + stop for a, b, _, stop in spans]
    return torch.stack([torch.cat(first), torch.cat(last)]).to(torch.int32)


def query_tiles(spans: Sequence[tuple[int, int, int, int]], queries: int = QUERIES) -> Tensor:
    """`tiles` of latent_attention, on the CPU: the spans, cut into pieces of one program's queries.

    A new piece begins with every span, so no tile of scores joins two documents. The pieces with
    the most keys come first, as the programs that start last should be short.

    Args:
        spans: as in key_ranges.
        queries: queries per program.

    Returns:
        int32 `[n, 4]`, a span each: first query, end of queries, first key, end of keys.

    Raises:
        ValueError: see key_ranges.
    """
    _check_spans(spans)
    pieces = [
        (at, min(at + queries, b), start, stop - b + min(at + queries, b))
        for a, b, start, stop in spans
        for at in range(a, b, queries)
    ]
    pieces.sort(key=lambda piece: piece[2] - piece[3])
    return torch.tensor(pieces, dtype=torch.int32)


def reads_of(spans: Sequence[tuple[int, int, int, int]]) -> dict[str, Tensor]:
    """`tiles` or `ranges` of latent_attention, on the CPU, whichever needs less work.

    Work is counted in tiles of 128 x 128 scores; a program itself costs about as much as one such
    tile. Where both need the same work, as for a rank's chunks of one document, ranges are faster.

    Args:
        spans: as in key_ranges.

    Returns:
        The chosen one, as a keyword argument: `{"tiles": ...}` or `{"ranges": ...}`.

    Raises:
        ValueError: see key_ranges.
    """
    tiles, ranges = query_tiles(spans), key_ranges(spans)
    cut = 2 + (tiles[:, 3] - tiles[:, 2] - 1) // QUERIES
    last = [block[-1] for block in ranges[1].split(QUERIES)]
    through = 2 + torch.stack(last) // QUERIES - ranges[0, ::QUERIES] // QUERIES
    return {"tiles": tiles} if cut.sum() < through.sum() else {"ranges": ranges}


def _check_spans(spans: Sequence[tuple[int, int, int, int]]) -> None:
    if not isinstance(spans, Sequence) or isinstance(spans, str) or not spans:
        raise ValueError("spans is no sequence of (first query, end, first key, end): give one")
    end = opened = closed = 0
    for span in spans:
        whole = isinstance(span, Sequence) and len(span) == 4
        if not whole or not all(isinstance(x, int) and 0 <= x < 2**31 for x in span):
            raise ValueError(f"span {span!r} is not four integers from 0 on: give those")
        a, b, start, stop = span
        if a != end or b <= a:
            raise ValueError(f"span {span} follows query {end}: spans cover all queries in order")
        if stop - start < b - a or start < opened or stop - (b - a) + 1 < closed:
            raise ValueError(
                f"span {span} reads too few keys or earlier ones than the span before: give each"
                " at least as many keys as queries, and keys in order"
            )
        end, opened, closed = b, start, stop
