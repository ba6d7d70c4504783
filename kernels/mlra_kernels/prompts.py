"""Which prompts of a step attend in one launch, and to which rows of the cache.

Prompts, or chunks of them, lie one behind the other in a step. As many of them as have few enough
keys together are a bundle, which attends in one launch: their keys lie one behind the other too,
and each query reads some of its own sequence. A prompt with more keys is a bundle of its own, of
several parts, whose results are merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mlra_kernels.latent_attention import reads_of


@dataclass(frozen=True)
class PromptChunk:
    """The next tokens of one sequence's prompt, which are in the cache already."""

    tokens: int
    """How many; their queries follow those of the chunk before."""
    start: int
    """Tokens of the sequence in front of them."""
    pages: Tensor
    """`[P]` integers: the sequence's pages in the cache, at least those of `start + tokens`."""


@dataclass(frozen=True)
class Part:
    """One launch. Letters: s queries, t keys, n sequences."""

    slots: Tensor
    """`[t]` int64: page * page_size + offset of each key."""
    queries: tuple[int, ...]
    """Queries of each sequence; s in all."""
    keys: tuple[int, ...]
    """Keys of each sequence; t in all."""
    causal: bool
    """Whether a sequence's last query reads all its keys, the one before one less; else all read
    all, of one sequence."""
    reads: Mapping[str, Tensor] = field(default_factory=dict)
    """Of several sequences: what queries read, a keyword of `latent_attention_with_lse`."""
    offsets: Tensor | None = None
    """`[2, n + 1]` int32, of several sequences: where each one's queries and keys begin."""


@dataclass(frozen=True)
class Bundle:
    """Consecutive rows of a step and the parts whose merged results are theirs."""

    rows: slice
    parts: tuple[Part, ...]


def plan_prompts(
    chunks: Sequence[PromptChunk], page_size: int, keys_at_once: int
) -> tuple[Bundle, ...]:
    """The bundles of a step's chunks, in their order; made once, for all layers.

    Args:
        keys_at_once: keys of a launch, see `prefill.keys_at_once`; the new tokens of one chunk may
            be more.

    Raises:
        ValueError: a chunk without tokens, or with fewer pages than it needs.
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
    """Bundles of the chunks' rows and the tokens in front of them alone.

    For tokens of a sequence that are cut over caches: `start` counts those that lie in this one,
    and `pages` are its pages. Chunks without any are left out.
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
    # The last launch holds the chunk itself and as much of what is before it as it can.
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
    """x of the CPU on `device`, without waiting for what runs there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _slots(chunk: PromptChunk, page_size: int) -> Tensor:
    pages = chunk.pages.long()
    inside = torch.arange(page_size, device=pages.device)
    return (pages[:, None] * page_size + inside).flatten()[: chunk.start + chunk.tokens]
