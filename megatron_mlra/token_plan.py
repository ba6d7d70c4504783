"""Which tokens of a sequence a context-parallel rank holds, where they stand, and what they attend
to.

A sequence of T tokens is one document, or several packed one behind the other. Each token attends
to its own document's past and itself. A rank holds T / cp tokens as chunks: keys exist for the
whole sequence (context_parallel.py), so a chunk's part of a document attends to a prefix of that
document, which `Span` names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class Span(NamedTuple):
    """Local queries `[query_start, query_stop)`, which attend to keys `[key_start, key_stop)` of
    the whole sequence, causally: the last query to all of them, the one before to one less."""

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int


class Varlen(NamedTuple):
    """The spans as variable-length attention kernels take them."""

    cu_seqlens_q: Tensor
    """`[spans + 1]` int32."""
    cu_seqlens_kv: Tensor
    max_seqlen_q: int
    max_seqlen_kv: int
    key_index: Tensor | None
    """Key of each key row, where spans share keys or skip some; None: all keys in order."""


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """One rank's share of a sequence."""

    tokens: int
    """T, of the whole sequence."""
    spans: tuple[Span, ...]
    """In the order of the local queries, all of which they cover."""
    is_packed: bool
    """Whether the sequence was described as documents."""
    chunk_sizes: tuple[int, ...]
    """Tokens of every rank's chunks, rank by rank: what an all-gather makes."""
    chunk_order: tuple[int, ...]
    """Which of them is the sequence's first, second, ..."""
    positions: Tensor | None
    """`[T / cp]` int64: place of each local token in its document; None: 0 .. T - 1."""
    key_positions: Tensor | None
    """`[T]`, of all tokens."""

    @property
    def is_whole(self) -> bool:
        """Whether this is plain causal attention of the whole sequence, on this one rank."""
        return len(self.spans) == 1

    def in_sequence_order(self, gathered: Tensor) -> Tensor:
        """`[T, ...]` gathered rank by rank -> in the order of the sequence."""
        chunks = gathered.split(self.chunk_sizes)
        return torch.cat([chunks[i] for i in self.chunk_order])

    @cached_property
    def varlen(self) -> Varlen:
        """The spans as one variable-length batch, on the device of the tokens."""
        assert not self.is_whole, "one span needs no variable lengths"
        device = self.key_positions.device
        queries = [span.query_stop - span.query_start for span in self.spans]
        keys = [span.key_stop - span.key_start for span in self.spans]
        index = None
        if any(a.key_stop != b.key_start for a, b in pairwise(self.spans)):
            rows = [torch.arange(span.key_start, span.key_stop) for span in self.spans]
            index = torch.cat(rows).to(device)
        return Varlen(
            _cumulative(queries, device),
            _cumulative(keys, device),
            max(queries),
            max(keys),
            index,
        )


def plan_tokens(
    local: int,
    cp_size: int,
    cp_rank: int,
    packed: PackedSeqParams | None,
    device: torch.device,
) -> TokenPlan:
    """The share of context-parallel rank `cp_rank`.

    Megatron's two zig-zag cuts, both into 2 cp chunks of which rank r holds chunks r and
    2 cp - 1 - r: of the whole sequence (`get_batch_on_this_cp_rank`; documents may have any length
    and cross chunks), or, where `packed` has `cu_seqlens_q_padded`, of every document
    (`thd_get_partitioned_indices`), whose padded lengths then divide by 2 cp. Padding stands behind
    a document's tokens, so no token attends to it, and it is treated as tokens.

    Args:
        local: tokens this rank holds, T / cp.
        packed: describes the whole sequence, its lengths before the cut; None: one document. A
            `PackedDocuments` spares the wait for the device.

    Raises:
        ValueError: for lengths that do not fit the tokens or do not divide.
    """
    if packed is None:
        return _plan(None, False, local, cp_size, cp_rank, device)
    if packed.qkv_format != "thd":
        raise ValueError(f"packed sequences have qkv_format {packed.qkv_format!r}; use 'thd'")
    padded = packed.cu_seqlens_q_padded
    bounds = packed.bounds if isinstance(packed, PackedDocuments) else None
    if bounds is None:
        bounds = tuple((packed.cu_seqlens_q if padded is None else padded).flatten().tolist())
    return _plan(bounds, padded is not None, local, cp_size, cp_rank, device)


@dataclass
class PackedDocuments(PackedSeqParams):
    """Megatron's packed sequences, with the cumulative lengths on the host too."""

    bounds: tuple[int, ...] | None = None
    """0, then where each document ends."""


@lru_cache(maxsize=64)
def _plan(
    bounds: tuple[int, ...] | None,
    cut_documents: bool,
    local: int,
    cp_size: int,
    cp_rank: int,
    device: torch.device,
) -> TokenPlan:
    """`plan_tokens` of host values; all layers share the result."""
    tokens = local * cp_size
    documents = [(0, tokens)] if bounds is None else list(pairwise(bounds))
    documents = [(start, stop) for start, stop in documents if start != stop]
    if bounds is not None and (
        bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in documents)
    ):
        raise ValueError(
            f"cu_seqlens {_shown(bounds)} do not cover the {tokens} tokens of the sequence from 0"
            " to its end"
        )
    parts = documents if cut_documents else [(0, tokens)]
    for start, stop in parts:
        if cp_size > 1 and (stop - start) % (2 * cp_size):
            what = "packed document" if cut_documents else "sequence"
            raise ValueError(
                f"a {what} of {stop - start} tokens does not divide into {2 * cp_size} chunks of"
                f" context parallel size {cp_size}; pad it to a multiple of {2 * cp_size}"
            )
    chunks = [chunk for rank in range(cp_size) for chunk in _chunks(parts, cp_size, rank)]
    order = sorted(range(len(chunks)), key=chunks.__getitem__)
    own = _chunks(parts, cp_size, cp_rank)
    spans, at = [], 0
    for start, stop in own:
        for first, end in documents:
            a, b = max(start, first), min(stop, end)
            if a < b:
                spans.append(Span(at + a - start, at + b - start, first, b))
        at += stop - start
    positions = key_positions = None
    if len(spans) > 1:
        key_positions = torch.cat([torch.arange(stop - start) for start, stop in documents])
        positions = torch.cat([key_positions[start:stop] for start, stop in own])
        positions, key_positions = positions.to(device), key_positions.to(device)
    return TokenPlan(
        tokens=tokens,
        spans=tuple(spans),
        is_packed=bounds is not None,
        chunk_sizes=tuple(stop - start for start, stop in chunks),
        chunk_order=tuple(order),
        positions=positions,
        key_positions=key_positions,
    )


def _chunks(parts: list[tuple[int, int]], cp_size: int, rank: int) -> list[tuple[int, int]]:
    """The two chunks of each part that a rank holds; the part itself without context parallel."""
    if cp_size == 1:
        return parts
    found = []
    for start, stop in parts:
        size = (stop - start) // (2 * cp_size)
        for i in (rank, 2 * cp_size - 1 - rank):
            found.append((start + i * size, start + (i + 1) * size))
    return found


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


def _shown(bounds: tuple[int, ...]) -> str:
    shown = [str(bound) for bound in bounds]
    return ", ".join(shown if len(shown) < 8 else [*shown[:3], "...", *shown[-3:]])
