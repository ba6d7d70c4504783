"""Tensor- and context-parallel communication of one layer's attention. Pure Python; letters of
flops.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.sharding.partition import LatentShard


class Collective(NamedTuple):
    """One collective of a layer's attention."""

    what: str
    kind: str
    """'all_gather', 'reduce_scatter', 'all_reduce' or 'all_to_all'."""
    numbers: float
    """Numbers per token of the whole tensor; of an all-to-all those that one rank receives."""

    def wire_numbers(self, ranks: int) -> float:
        """Numbers that a rank sends per token: (1 - 1/ranks) n in a ring, twice that for an
        all-reduce."""
        if self.kind == "all_to_all":
            return self.numbers
        return (2 if self.kind == "all_reduce" else 1) * (ranks - 1) / ranks * self.numbers


@dataclass(frozen=True)
class Communication:
    """Communication of one layer's attention, without the MLP, over one group."""

    ranks: int
    """Size of the tensor- or context-parallel group."""
    forward: tuple[Collective, ...]
    backward: tuple[Collective, ...]

    @property
    def wire_numbers(self) -> float:
        """Numbers that a rank sends per token and layer, forward and backward."""
        return sum(c.wire_numbers(self.ranks) for c in self.forward + self.backward)


def tp_communication(
    shape: ModelDescription, tp: int, layout: str = "head", sequence_parallel: bool = False
) -> Communication:
    """Collectives of one layer's attention at tensor-parallel size `tp`, numbers per token.

    - entry and exit, d each. With sequence parallel: an all-gather before and a reduce-scatter
      after, and the reverse in backward. Without: an all-reduce after in forward, and one before in
      backward. Megatron's own attention (GQA) gathers its input again for the weight gradient;
    - latents, d_q + d_c + d_r: one all-gather of the compressed tensors, in backward a
      reduce-scatter. In the latent layout with tp <= L latents stay where they are made: d_q + d_r.
      GTA gathers the tensors that all heads share (d_r), and so do MFA (d_q + 2 c) and TPA
      (c (R_q + 2 R_kv)). GQA with g < tp gathers all its projections;
    - norms of columns that are split over ranks: none. They come behind the gather, with which
      their weights go as one more token;
    - latent layout: queries h (d_h + d_r) go to the latents, and branch outputs h d_v back to the
      heads. At tp > N a rank works on N h / tp heads, and the exchange is an all-to-all. At N = 1
      some of these heads, at tp = L all of them, are the rank's own.

    Recomputing up-projections repeats the exchange of queries. Recomputing all layers repeats every
    forward collective except the exit.

    Args:
        layout: 'head' or 'latent', of the latent family.

    Raises:
        ValueError: the layout is unknown.
    """
    if layout not in ("head", "latent"):
        raise ValueError(f"layout is {layout!r}; use head or latent")
    if tp == 1:
        return Communication(tp, (), ())
    d, h = shape.hidden_size, shape.num_attention_heads
    forward: list[Collective] = []
    backward: list[Collective] = []

    def both(what: str, kind: str, reverse: str, numbers: float) -> None:
        forward.append(Collective(what, kind, numbers))
        backward.insert(0, Collective(what, reverse, numbers))

    if sequence_parallel:
        both("entry", "all_gather", "reduce_scatter", d)
        if shape.attention == "gqa":
            backward.insert(0, Collective("entry, again", "all_gather", d))
    else:
        backward.append(Collective("entry", "all_reduce", d))
    if shape.attention == "mlra":
        L, N, d_r = shape.num_latent_heads, shape.num_branches, shape.qk_rope_head_dim
        latents = 0 if layout == "latent" and tp <= L else shape.kv_lora_rank
        compressed = (shape.q_lora_rank or 0) + latents + d_r
        both("latents", "all_gather", "reduce_scatter", compressed)
        if layout == "latent":
            q_dim, v_dim = shape.qk_nope_head_dim + d_r, shape.v_head_dim
            if tp <= N:
                both("queries", "all_gather", "reduce_scatter", h * q_dim)
                both("branch outputs", "reduce_scatter", "all_gather", h * v_dim)
            else:
                both("queries", "all_to_all", "all_to_all", N * h / tp * q_dim)
                both("branch outputs", "all_to_all", "all_to_all", N * h / tp * v_dim)
    elif shared := _shared_numbers(shape, tp):
        both("shared by heads", "all_gather", "reduce_scatter", shared)
    if sequence_parallel:
        both("exit", "reduce_scatter", "all_gather", d)
    else:
        forward.append(Collective("exit", "all_reduce", d))
    return Communication(tp, tuple(forward), tuple(backward))


def cp_communication(
    shape: ModelDescription, cp: int, tp: int = 1, layout: str = "head"
) -> Communication:
    """Collectives of one layer's attention at context-parallel size `cp`, numbers per token of the
    whole sequence, on each of `tp` tensor-parallel ranks.

    There is one all-gather of the RoPE key and of the latents that the rank reads, in backward a
    reduce-scatter: N max(G / tp, 1) d_l + d_r in the head layout (d_c + d_r if G = 1),
    max(L / tp, 1) d_l + d_r in the latent layout. Recomputing all layers repeats the all-gather;
    recomputing the core or the up-projections does not.

    Raises:
        ValueError: the layout is unknown, or the attention is not 'mlra' (Megatron's own context
            parallelism serves the others).
    """
    if shape.attention != "mlra":
        raise ValueError(f"attention is {shape.attention!r}; use mlra, which gathers latents")
    if layout not in ("head", "latent"):
        raise ValueError(f"layout is {layout!r}; use head or latent")
    if cp == 1:
        return Communication(cp, (), ())
    shard = LatentShard.plan(shape, tp, 0, layout)
    numbers = shard.branches * shard.groups * shape.latent_dim + shape.qk_rope_head_dim
    return Communication(
        cp,
        (Collective("latents", "all_gather", numbers),),
        (Collective("latents", "reduce_scatter", numbers),),
    )


def _shared_numbers(shape: ModelDescription, tp: int) -> int:
    """Numbers per token that a baseline gathers from column-parallel projections."""
    c = shape.head_dim
    if shape.attention == "gta":
        return shape.qk_rope_head_dim
    if shape.attention == "mfa":
        return shape.q_lora_rank + 2 * c
    if shape.attention == "tpa":
        return c * (shape.tpa_q_rank + 2 * shape.tpa_kv_rank)
    queries = shape.num_attention_heads * (2 if shape.output_gate else 1)
    return (queries + 2 * shape.num_query_groups) * c if shape.num_query_groups < tp else 0
