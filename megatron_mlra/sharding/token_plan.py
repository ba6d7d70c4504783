"""The tokens of a sequence that a context-parallel rank holds, their positions, and their keys.

A sequence of T tokens is one document, or several documents packed one after the other. Each token
attends to itself and to earlier tokens of its document. A rank holds T / cp tokens as chunks. After
the context-parallel gather (context_parallel.py) every rank has the keys of the whole sequence. The
queries of one chunk that belong to one document therefore attend to that document from its start
up to themselves. `Span` holds those two ranges: the queries and their keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class Span(NamedTuple):
    """Local queries `[query_start, query_stop)`, which attend causally to the keys `[key_start,
    key_stop)` of the whole sequence: the last query to all keys, the one before to all but one."""

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int


class Varlen(NamedTuple):
    """The spans in the form of variable-length attention kernels."""

    cu_seqlens_q: Tensor
    """`[spans + 1]` int32."""
    cu_seqlens_kv: Tensor
    max_seqlen_q: int
    max_seqlen_kv: int
    key_index: Tensor | None
    """int64: the key of each key row, if spans share keys or skip some. None: all keys in order."""


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """One rank's share of a sequence."""

    tokens: int
    """T, tokens of the whole sequence."""
    spans: tuple[Span, ...]
    """Spans of all local queries, in their order."""
    is_packed: bool
    """Whether the sequence was described as documents."""
    own_chunks: tuple[tuple[int, int], ...]
    """(first, end) of each chunk of this rank, in the order of the rank's tokens."""
    chunk_sizes: tuple[int, ...]
    """Tokens of each chunk of all ranks, rank by rank, as in the output of an all-gather."""
    chunk_order: tuple[int, ...]
    """Indices into `chunk_sizes` in the order of the sequence."""
    positions: Tensor | None
    """`[T / cp]` int64: position of each local token in its document; None: 0 .. T - 1."""
    key_positions: Tensor | None
    """`[T]` int64: the same of all tokens of the sequence."""

    @property
    def is_whole(self) -> bool:
        """Whether this is plain causal attention over one document, all of it on this rank."""
        return self.spans == (Span(0, self.tokens, 0, self.tokens),)

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens of `x`, which has the whole sequence along `dim`."""
        return torch.cat([x.narrow(dim, a, b - a) for a, b in self.own_chunks], dim)

    def in_sequence_order(self, gathered: Tensor) -> Tensor:
        """`[T, ...]` in the order of ranks -> `[T, ...]` in the order of the sequence."""
        chunks = gathered.split(self.chunk_sizes)
        return torch.cat([chunks[i] for i in self.chunk_order])

    @cached_property
    @torch.inference_mode(False)
    def varlen(self) -> Varlen:
        """The spans as a variable-length batch, on the device of the tokens."""
        assert not self.is_whole, "the whole sequence needs no variable lengths"
        device = self.key_positions.device
        queries = [span.query_stop - span.query_start for span in self.spans]
        keys = [span.key_stop - span.key_start for span in self.spans]
        index = None
        rows = torch.cat([torch.arange(span.key_start, span.key_stop) for span in self.spans])
        if not torch.equal(rows, torch.arange(self.tokens)):
            index = rows.to(device)
        return Varlen(
            _cumulative(queries, device),
            _cumulative(keys, device),
            max(queries),
            max(keys),
            index,
        )

    @cached_property
    @torch.inference_mode(False)
    def latent_reads(self) -> dict[str, Tensor]:
        """The spans as a keyword of `mlra_kernels.latent_attention`, on the tokens' device."""
        from mlra_kernels.latent_attention import reads_of

        device = self.key_positions.device
        return {name: x.to(device) for name, x in reads_of(self.spans).items()}


def plan_tokens(
    local: int,
    cp_size: int,
    cp_rank: int,
    packed: PackedSeqParams | None,
    device: torch.device,
) -> TokenPlan:
    """The share of context-parallel rank `cp_rank`.

    Cuts are zig-zag: of 2 cp chunks, rank r holds chunks r and 2 cp - 1 - r. There are three cases:

    - The whole sequence is cut, as `get_batch_on_this_cp_rank` does. Documents may have any length
      and cross chunks.
    - Every document is cut, as `thd_get_partitioned_indices` does, if `packed` has
      `cu_seqlens_q_padded`. Padded lengths divide by 2 cp. Padding follows a document's tokens, so
      that no token attends to it; it is treated as tokens.
    - Every document is cut, without padding, if `packed` is a `PackedDocuments`.

    Args:
        local: tokens of this rank, T / cp.
        packed: the documents of the whole sequence, before the cut; None: one document.

    Raises:
        ValueError: the lengths do not sum to the tokens, or do not divide by 2 cp.
    """
    if packed is None:
        return _plan(None, False, local, cp_size, cp_rank, device)
    if packed.qkv_format != "thd":
        raise ValueError(f"packed sequences have qkv_format {packed.qkv_format!r}; use 'thd'")
    if isinstance(packed, PackedDocuments):
        return _plan(packed.bounds, True, local, cp_size, cp_rank, device)
    padded = packed.cu_seqlens_q_padded
    bounds = tuple((packed.cu_seqlens_q if padded is None else padded).flatten().tolist())
    if padded is not None:
        for length in _lengths(bounds):
            _check_divides("packed document", length, cp_size)
    return _plan(bounds, padded is not None, local, cp_size, cp_rank, device)


@dataclass
class PackedDocuments(PackedSeqParams):
    """Megatron's packed sequences with the cumulative lengths on the host, so that no layer waits
    for the device."""

    bounds: tuple[int, ...] = ()
    """0, then the end of each document."""


# Not in inference mode: training may use tensors that were cached during evaluation.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _plan(
    bounds: tuple[int, ...] | None,
    cut_documents: bool,
    local: int,
    cp_size: int,
    cp_rank: int,
    device: torch.device,
) -> TokenPlan:
    """`plan_tokens` of values on the host, cached for all layers."""
    tokens = local * cp_size
    if bounds is not None and (
        not bounds or bounds[0] != 0 or bounds[-1] != tokens or min(_lengths(bounds)) < 0
    ):
        raise ValueError(
            f"cu_seqlens {_shown(bounds)} do not cover the {tokens} tokens of the sequence from 0"
            " to its end"
        )
    documents = [(a, b) for a, b in pairwise(bounds or (0, tokens)) if a < b]
    if not cut_documents:
        _check_divides("sequence", tokens, cp_size)
    by_rank = _zig_zag(documents if cut_documents else [(0, tokens)], cp_size)
    chunks = [chunk for own in by_rank for chunk in own]
    own = by_rank[cp_rank]
    spans, at = [], 0
    for start, stop in own:
        for first, end in documents:
            a, b = max(start, first), min(stop, end)
            if a < b:
                spans.append(Span(at + a - start, at + b - start, first, b))
        at += stop - start
    positions = key_positions = None
    if spans != [(0, tokens, 0, tokens)]:
        key_positions = torch.cat([torch.arange(stop - start) for start, stop in documents])
        positions = torch.cat([key_positions[start:stop] for start, stop in own])
        positions, key_positions = positions.to(device), key_positions.to(device)
    return TokenPlan(
        tokens=tokens,
        spans=tuple(spans),
        is_packed=bounds is not None,
        own_chunks=tuple(own),
        chunk_sizes=tuple(stop - start for start, stop in chunks),
        chunk_order=tuple(sorted(range(len(chunks)), key=chunks.__getitem__)),
        positions=positions,
        key_positions=key_positions,
    )


def _zig_zag(parts: list[tuple[int, int]], cp_size: int) -> list[list[tuple[int, int]]]:
    """Each rank's chunks of the parts; all ranks get equally many tokens.

    The tokens that remain of a part after division by 2 cp lengthen the chunks of one rank after
    the other. The next part continues with the next rank.
    """
    if cp_size == 1:
        return [parts]
    by_rank: list[list[tuple[int, int]]] = [[] for _ in range(cp_size)]
    turn = 0
    for start, stop in parts:
        size, left = divmod(stop - start, 2 * cp_size)
        sizes = [size] * (2 * cp_size)
        for _ in range(left):
            rank = turn % cp_size
            sizes[rank if sizes[rank] == size else -1 - rank] += 1
            turn += 1
        ends = list(accumulate(sizes, initial=start))
        for rank, own in enumerate(by_rank):
            pairs = (ends[i : i + 2] for i in (rank, 2 * cp_size - 1 - rank))
            own += [(a, b) for a, b in pairs if a < b]
    return by_rank


def _check_divides(what: str, length: int, cp_size: int) -> None:
    if cp_size > 1 and length % (2 * cp_size):
        raise ValueError(
            f"a {what} of {length} tokens does not divide into {2 * cp_size} chunks of context"
            f" parallel size {cp_size}; pad it to a multiple of {2 * cp_size}"
        )


def _lengths(bounds: tuple[int, ...]) -> list[int]:
    return [b - a for a, b in pairwise(bounds)]


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


def _shown(bounds: tuple[int, ...]) -> str:
    shown = [str(bound) for bound in bounds]
    return ", ".join(shown if len(shown) < 8 else [*shown[:3], "...", *shown[-3:]])
