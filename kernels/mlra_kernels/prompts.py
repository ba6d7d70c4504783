"""The plan of a step's prompts: which share a launch, and which rows of the cache they read.

The tokens of prompts, or of chunks of prompts, follow one another in a step. Consecutive chunks
with few enough keys in total form a bundle, which attends in one launch: their keys follow one
another too, and each query reads some of its own sequence. A chunk with more keys is a bundle by
itself, of several parts, whose results are merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mlra_kernels.latent_attention import reads_of

EVERY_BUILD = (1, 200)
"""Tokens of two prompts alike whose launch needs one build of the kernel, and the other: the first
reads `ranges`, the second `tiles` (`reads_of`)."""


@dataclass(frozen=True)
class PromptChunk:
    """The next tokens of one sequence's prompt, which are in the cache already."""

    tokens: int
    """Number of tokens; their queries follow those of the previous chunk."""
    start: int
    """Number of the sequence's tokens before the chunk."""
    pages: Tensor
    """`[P]` integers: the sequence's pages in the cache, enough for `start + tokens` tokens."""


@dataclass(frozen=True)
class Part:
    """One launch. Letters: s queries, t keys, n sequences."""

    slots: Tensor
    """`[t]` int64: page * page_size + offset of each key."""
    queries: tuple[int, ...]
    """Queries of each sequence, s in total."""
    keys: tuple[int, ...]
    """Keys of each sequence, t in total."""
    causal: bool
    """Whether attention is causal: a sequence's last query reads all its keys, the one before all
    but one. Else there is one sequence, all of whose queries read all keys."""
    reads: Mapping[str, Tensor] = field(default_factory=dict)
    """The keys that queries read, as a keyword of `latent_attention_with_lse`; only for several
    sequences."""
    offsets: Tensor | None = None
    """`[2, n + 1]` int32, start of each sequence's queries and keys; only for several sequences."""


@dataclass(frozen=True)
class Bundle:
    """Consecutive rows of a step, and the parts whose merged results are the rows' attention."""

    rows: slice
    parts: tuple[Part, ...]


def plan_prompts(
    chunks: Sequence[PromptChunk], page_size: int, keys_at_once: int
) -> tuple[Bundle, ...]:
    """The bundles of a step's chunks, in their order. One plan serves all layers.

    Args:
        keys_at_once: most keys of a launch (`prefill.keys_at_once`), unless the new tokens of one
            chunk are more.

    Raises:
        ValueError: a chunk has no tokens, or fewer pages than it needs.
    """
    for i, chunk in enumerate(chunks):
        needed = chunk.start + chunk.tokens
        if chunk.tokens < 1 or chunk.start < 0 or chunk.pages.numel() * page_size < needed:
            raise ValueError(
                f"chunk {i} has {chunk.tokens} tokens behind {chunk.start} on"
                f" {chunk.pages.numel()} pages of {page_size}: give at least one token, and a page"
                " for every one"
            )
    bundles, own, first = [], [], 0
    for chunk in chunks:
        if own and sum(c.start + c.tokens for c in (*own, chunk)) > keys_at_once:
            bundles.append(_bundle(own, first, page_size, keys_at_once))
            first, own = bundles[-1].rows.stop, []
        own.append(chunk)
    if own:
        bundles.append(_bundle(own, first, page_size, keys_at_once))
    return tuple(bundles)


def plan_history(
    chunks: Sequence[PromptChunk], page_size: int, keys_at_once: int
) -> tuple[Bundle, ...]:
    """Bundles in which the chunks' rows read only the tokens before the chunks.

    For sequences whose tokens are cut over several caches: `start` counts the tokens in this cache,
    and `pages` are pages of this cache. Chunks with `start` 0 are left out.
    """
    bundles, first = [], 0
    for chunk in chunks:
        rows = slice(first, first + chunk.tokens)
        first = rows.stop
        if not chunk.start:
            continue
        slots = _slots(chunk, page_size)[: chunk.start]
        parts = tuple(
            Part(some, (chunk.tokens,), (len(some),), causal=False)
            for some in slots.split(keys_at_once)
        )
        bundles.append(Bundle(rows, parts))
    return tuple(bundles)


def _bundle(chunks: list[PromptChunk], first: int, page_size: int, limit: int) -> Bundle:
    rows = slice(first, first + sum(chunk.tokens for chunk in chunks))
    if len(chunks) > 1:
        return Bundle(rows, (_together(chunks, page_size),))
    (chunk,) = chunks
    end = chunk.start + chunk.tokens
    slots = _slots(chunk, page_size)
    # The last launch has the chunk itself, and as many of the tokens before it as fit.
    last = end - min(end, max(chunk.tokens, limit))
    cuts = [*range(0, last, limit), last]
    parts = [Part(slots[a:b], (chunk.tokens,), (b - a,), causal=False) for a, b in pairwise(cuts)]
    parts.append(Part(slots[last:], (chunk.tokens,), (end - last,), causal=True))
    return Bundle(rows, tuple(parts))


def _together(chunks: list[PromptChunk], page_size: int) -> Part:
    queries = tuple(chunk.tokens for chunk in chunks)
    keys = tuple(chunk.start + chunk.tokens for chunk in chunks)
    slots = torch.cat([_slots(chunk, page_size) for chunk in chunks])
    begins = [list(accumulate(counts, initial=0)) for counts in (queries, keys)]
    spans = [(*q, *k) for q, k in zip(*map(pairwise, begins), strict=True)]
    reads = {name: _sent(x, slots.device) for name, x in reads_of(spans).items()}
    offsets = _sent(torch.tensor(begins, dtype=torch.int32), slots.device)
    return Part(slots, queries, keys, True, reads, offsets)


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """x, a tensor on the CPU, copied to `device` without waiting for the device."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _slots(chunk: PromptChunk, page_size: int) -> Tensor:
    pages = chunk.pages.long()
    inside = torch.arange(page_size, device=pages.device)
    return (pages[:, None] * page_size + inside).flatten()[: chunk.start + chunk.tokens]
