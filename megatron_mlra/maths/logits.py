"""The largest attention logit of each query head, and the weights' factors that bound it (QK-clip).

A logit is a score as it enters the softmax: `t q . k`, with the mask of the attention. The maximum
is over the keys that a query reads, so it is no bound as the log-sum-exp is.

QK-clip (Kimi K2, arXiv 2507.20534, section 2.1: MuonClip) shrinks a head whose largest logit S
exceeds a threshold tau by gamma = tau / S, in its weights, behind the optimizer's step. With MLA's
shared RoPE key the paper scales the head's NoPE query by gamma^alpha, its NoPE key by
gamma^(1 - alpha) (alpha = 1/2) and its RoPE query by gamma, and leaves the RoPE key, which all
heads share. Each logit of the head is then gamma times what it was, the RoPE part too.

Here a head i has N branches, and a logit of branch b is

    t (q_i^nope . W_UK_b,i c_b  +  q_i^rope . k_r)

Of these W_UK_b,i alone is the branch's own; both queries serve all branches of the head. The RoPE
part of every branch shrinks by the factor of q_i^rope, whatever else is done. A branch whose NoPE
part shrank by less would lose the RoPE part that balances it: parts of 150 and -60 make 90, below a
threshold of 100, and 120 once the RoPE part alone is halved. So all branches of a head shrink
by one gamma, that of the head's largest logit over its branches. Nothing less holds every logit at
the threshold, and what the head's branches score keeps its proportions. MLA and GLA are the case
N = 1. Without RoPE dims (NoPE) nothing binds the branches, and each shrinks by its own gamma_b: the
query, which they share, by alpha of what all of them shrink by, (max_b gamma_b)^alpha, and the keys
of a branch by the rest. A branch below the threshold then keeps its bits.

Absorbed or materialized, the logits and weights are the same, and the output gate stands behind
them. `linear_q_proj` takes the place of `linear_q_up_proj` without a query latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mlra.maths.norms import widen

SCORES = 2**24
"""Scores that are held at once: 64 MiB in float32."""


@torch.no_grad()
def largest_logits(
    query: Tensor,
    key: Tensor,
    softmax_scale: float,
    spans: Sequence[tuple[int, int, int, int]] | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """The largest logit of each query head, over queries, sequences and the keys that are read.

    It costs the first of the core's two matrix products once more, in float32, block by block.
    Beside a block's scores it holds one key head's keys in float32.

    Args:
        query: `[s, b, heads, e]`; query head i reads key head `i // (heads / kv_heads)`.
        key: `[t, b, kv_heads, e]`.
        spans: (first query, their end, first key, their end), causal from each span's last query
            and key; default: all queries, the last s of the t keys.
        allowed: `[b or 1, 1, s, t]`, True where a query reads a key; replaces the spans.

    Returns:
        `[heads]` in float32 (float64 of float64 inputs); -inf for a head without a query.
    """
    s, b, heads, _ = query.shape
    t, kv_heads = key.size(0), key.size(2)
    served = heads // kv_heads
    found = widen(query.new_full((kv_heads, served), -torch.inf))
    whole = [(0, s, 0, t)]
    for kv_head in range(kv_heads):
        # In float32 a head at a time: all of them would be as large as the scores.
        own = query[:, :, kv_head * served : (kv_head + 1) * served]
        keys = widen(key[:, :, kv_head]).permute(1, 2, 0)  # [b, e, t]
        for first, end, start, stop in whole if spans is None or allowed is not None else spans:
            rows = max(1, SCORES // (b * served * (stop - start)))
            for a in range(first, end, rows):
                z = min(a + rows, end)
                # No query of the block reads a key behind that of its last.
                read = stop if allowed is not None else stop - (end - z)
                block = widen(own[a:z]).permute(1, 2, 0, 3).flatten(1, 2)
                scores = (block @ keys[..., start:read]).view(b, served, z - a, read - start)
                if allowed is None:
                    ones = torch.ones(z - a, read - start, dtype=torch.bool, device=query.device)
                    unread = ones.triu(1 + read - start - (z - a))
                else:
                    unread = ~allowed[:, :, a:z, start:read]
                scores = scores.masked_fill_(unread, -torch.inf)
                found[kv_head] = torch.maximum(found[kv_head], scores.amax((0, 2, 3)))
    return found.flatten() * softmax_scale


class Shrink(NamedTuple):
    """Factors of weights, in float64; 1 leaves a weight as it is."""

    nope: Tensor
    """`[heads]`, of a head's NoPE query."""
    rope: Tensor
    """`[heads]`, of a head's RoPE query."""
    key: Tensor
    """`[N, heads]`, of a branch's and head's key up-projection."""


def shrink(largest: Tensor, threshold: float, alpha: float, has_rope: bool = True) -> Shrink | None:
    """The factors by which no logit exceeds `threshold`; None where none does.

    Args:
        largest: `[N, heads]`, the largest logit of each branch and head. A head of which one is not
            finite is left alone: its weights would become zeros or NaN.
        alpha: the query's share of the factor, between 0 and 1; the paper's is 1/2.
        has_rope: whether the branches of a head share a RoPE score.
    """
    largest = largest.double()
    bound = largest.amax(0).expand_as(largest) if has_rope else largest
    exceeds = (bound > threshold) & largest.isfinite().all(0)
    if not exceeds.any():
        return None
    gamma = torch.where(exceeds, threshold / bound, 1.0)
    common = gamma.amax(0)  # with RoPE every branch's
    return Shrink(common**alpha, common, gamma / common**alpha)
