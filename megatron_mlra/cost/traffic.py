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
    """Per token: of the gathered, scattered or reduced whole; what an all-to-all hands one rank."""

    def wire_numbers(self, ranks: int) -> float:
        """Numbers a rank sends per token: rings (1 - 1/ranks) n, an all-reduce twice that."""
        if self.kind == "all_to_all":
            return self.numbers
        return (2 if self.kind == "all_reduce" else 1) * (ranks - 1) / ranks * self.numbers


@dataclass(frozen=True)
class Communication:
    """Communication of one layer's attention over one group (the MLP's is not in it)."""

    ranks: int
    """Size of the tensor- or context-parallel group."""
    forward: tuple[Collective, ...]
    backward: tuple[Collective, ...]

    @property
    def forward_numbers(self) -> float:
        """Numbers a token and layer, forward: the sum over collectives."""
        return sum(c.numbers for c in self.forward)

    @property
    def backward_numbers(self) -> float:
        """Numbers a token and layer, backward."""
        return sum(c.numbers for c in self.backward)

    @property
    def wire_numbers(self) -> float:
        """Numbers a rank sends a token and layer, forward and backward."""
        return sum(c.wire_numbers(self.ranks) for c in self.forward + self.backward)


def tp_communication(
    shape: ModelDescription, tp: int, layout: str = "head", sequence_parallel: bool = False
) -> Communication:
    """Collectives of one layer's attention at tensor-parallel size `tp`, numbers per token.

    - entry and exit, d each: all-gather before and reduce-scatter after with sequence parallel (the
      reverse backward), else one all-reduce forward after and one backward before. Megatron's own
      attention (GQA) gathers its input once more for the weight gradient;
    - latents, d_q + d_c + d_r: one all-gather of what is compressed, backward a reduce-scatter. The
      latent layout keeps c where it is made while tp <= L: d_q + d_r. Likewise what all heads share
      in GTA (d_r), MFA (d_q + 2 c) and TPA (c (R_q + 2 R_kv)); GQA with g < tp gathers all its
      projections;
    - norms: the sum of squares of a query latent split over ranks, 1, and of each latent head where
      tp > L splits it, L; all-reduced forward and backward;
    - latent layout: queries h (d_h + d_r) to the latents and branch outputs h d_v back to the
      heads. At tp > N a rank works on N h / tp heads and the exchange is an all-to-all (at N = 1
      some of these, at tp = L all of them, are the rank's own).

    Recomputing up-projections repeats the exchange of queries, recomputing all layers every forward
    collective but the exit.
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
        norms = (1 if shape.q_lora_rank else 0) + (L if tp > L else 0)
        if norms:
            both("norms", "all_reduce", "all_reduce", norms)
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
        if shape.attention == "mfa":
            both("norms", "all_reduce", "all_reduce", 1)
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

    One all-gather of the latents the rank reads and the RoPE key, backward a reduce-scatter: head
    layout N max(G / tp, 1) d_l + d_r (d_c + d_r where G = 1), latent layout max(L / tp, 1) d_l +
    d_r. Recomputing all layers repeats it, recomputing the core or the up-projections does not.

    Raises:
        ValueError: for attentions other than MLRA, whose context parallelism is Megatron's own.
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
    """What all heads share and is gathered from column-parallel projections, numbers per token."""
    c = shape.head_dim
    if shape.attention == "gta":
        return shape.qk_rope_head_dim
    if shape.attention == "mfa":
        return shape.q_lora_rank + 2 * c
    if shape.attention == "tpa":
        return c * (shape.tpa_q_rank + 2 * shape.tpa_kv_rank)
    queries = shape.num_attention_heads * (2 if shape.output_gate else 1)
    return (queries + 2 * shape.num_query_groups) * c if shape.num_query_groups < tp else 0
