"""The matrices that a rank's attention weights consist of. Pure Python.

An optimizer of whole matrices (Muon) must see the matrices of the method, not the blocks in which
they are stored: the query projection of each head, the key and the value up-projection of each
branch and head, the down-projection of each latent.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.sharding.partition import LatentShard


@dataclass(frozen=True)
class Rows:
    """A run of rows. The local rows of a weight are groups, and each group has the same runs."""

    count: int
    """Local rows of the run in each group."""
    matrix: int
    """Rows of each matrix in the run."""
    gathered: bool = False
    """Whether a matrix is cut over ranks: it is in the runs of all ranks, concatenated."""
    name: str = ""
    """Name of such a matrix, in words."""


def latent_matrices(model: ModelDescription, shard: LatentShard) -> dict[str, tuple[Rows, ...]]:
    """Module name -> the runs of its local rows; all axes but the last count as rows.

    The output projection, which is a single matrix, is not listed.

    Args:
        model: a description of kind 'mlra', or a configuration with its sizes.
    """
    d_h, d_r, d_v = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
    tp, d_l = shard.tp_size, model.latent_dim
    queries = (Rows(d_h, d_h, name="a head's NoPE query"), Rows(d_r, d_r, name="its RoPE query"))
    queries = queries[: 1 + (d_r > 0)]
    latents, rope = model.kv_lora_rank // tp, d_r // tp
    found = {
        "linear_kv_down_proj": (
            Rows(latents, d_l, gathered=latents % d_l != 0, name="a latent head"),
            Rows(rope, d_r, gathered=tp > 1, name="the RoPE key"),
        )[: 1 + (d_r > 0)],
        "linear_kv_up_proj": (
            Rows(d_h, d_h, name="a branch's and head's key"),
            Rows(d_v, d_v, name="its value"),
        ),
    }
    if model.q_lora_rank is None:
        found["linear_q_proj"] = queries
    else:
        rank = model.q_lora_rank
        found["linear_q_down_proj"] = (
            Rows(rank // tp, rank, gathered=tp > 1, name="the query latent"),
        )
        found["linear_q_up_proj"] = queries
    if model.output_gate:
        found["linear_gate_proj"] = (Rows(d_v, d_v, name="a head's gate"),)
    return found


def grouped_query_matrices(
    num_attention_heads: int, num_query_groups: int, head_dim: int, gated: bool
) -> tuple[Rows, ...]:
    """The runs of Megatron's `linear_qkv`; per key/value head: queries, (gates,) key, value."""
    queries = Rows(num_attention_heads // num_query_groups * head_dim, head_dim, name="a query")
    gates = (Rows(queries.count, head_dim, name="a gate"),) if gated else ()
    return (
        queries,
        *gates,
        Rows(head_dim, head_dim, name="a key"),
        Rows(head_dim, head_dim, name="a value"),
    )
