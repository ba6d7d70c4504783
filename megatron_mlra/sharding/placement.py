"""The placement of every weight: its global shape, and the part that each rank holds. Pure Python.

`placements` is the only such table. The modules and checkpoints of training, the sharding of
inference, and docs/parallelism.md follow it.

Letters: V vocabulary, d hidden size, f hidden size of an MLP, h attention heads, L latent heads, N
branches, G = L / N head groups, d_q, d_c, d_l = d_c / L, d_h, d_r, d_v as in docs/notation.md; g
key/value heads and c head dim of grouped queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.sharding.partition import LatentShard

Box = tuple[slice, ...]
"""A part of a global tensor, one slice per leading axis; later axes are whole."""


@dataclass(frozen=True)
class Share:
    """The part of a layer's attention that one rank holds, as ranges of the global sizes."""

    query_latent: slice
    """Range of d_q."""
    latents: tuple[slice, ...]
    """Ranges of d_c, one per run of adjacent latents."""
    rope: slice
    """Range of d_r."""
    heads: slice
    """Range of h: heads whose query, gate and output projections the rank holds."""
    branches: slice
    """Range of N: branches of the core's (branch, head) pairs."""
    core_heads: slice
    """Range of h: heads of the core's pairs."""


@dataclass(frozen=True)
class Placement:
    """The placement of one weight."""

    letters: str
    """Global shape in letters."""
    shape: tuple[int, ...]
    """Global shape."""
    cut: str
    """Sharding in training, in words."""
    served: str
    """Sharding in inference, in words."""
    boxes: Callable[[Share], tuple[Box, ...]]
    """The rank's parts; concatenated along the first axis they are its local weight."""


def training_share(model: ModelDescription, shard: LatentShard) -> Share:
    """The rank's share in training, in the layout of `shard`.

    Args:
        model: a description of kind 'mlra', or a configuration with its sizes.
    """
    tp, rank = shard.tp_size, shard.tp_rank

    def even(size: int) -> slice:
        return _run(rank * (size // tp), size // tp)

    return Share(
        query_latent=even(model.q_lora_rank or 0),
        latents=(even(model.kv_lora_rank),),
        rope=even(model.qk_rope_head_dim),
        heads=even(model.num_attention_heads),
        branches=_run(shard.branch_start, shard.branches),
        core_heads=_run(shard.head_start, shard.heads),
    )


def serving_share(
    model: ModelDescription, core: LatentShard, own_start: int, own_heads: int
) -> Share:
    """The rank's share in inference: the latents that its core reads, the whole query latent and
    RoPE key, and the projections of the heads `own_start` to `own_start + own_heads - 1`."""
    l, groups = model.latent_dim, model.num_head_groups
    starts = [
        (branch * groups + core.group_start) * l
        for branch in range(core.branch_start, core.branch_start + core.branches)
    ]
    return Share(
        query_latent=slice(0, model.q_lora_rank or 0),
        latents=tuple(_run(start, core.groups * l) for start in starts),
        rope=slice(0, model.qk_rope_head_dim),
        heads=_run(own_start, own_heads),
        branches=_run(core.branch_start, core.branches),
        core_heads=_run(core.head_start, core.heads),
    )


def placements(model: ModelDescription) -> dict[str, Placement]:
    """Module name -> placement of every weight of a layer's latent attention.

    Args:
        model: a description of kind 'mlra', or a configuration with its sizes.
    """
    d, h, d_c, d_r = (
        model.hidden_size,
        model.num_attention_heads,
        model.kv_lora_rank,
        model.qk_rope_head_dim,
    )
    d_h, d_v, d_l = model.qk_nope_head_dim, model.v_head_dim, model.latent_dim
    q_dim = d_h + d_r

    def heads(size: int) -> Callable[[Share], tuple[Box, ...]]:
        return lambda share: ((_scaled(share.heads, size),),)

    def latent_rows(share: Share) -> tuple[Box, ...]:
        return tuple((rows,) for rows in share.latents)

    def down_rows(share: Share) -> tuple[Box, ...]:
        return (*latent_rows(share), (_run(d_c + share.rope.start, _length(share.rope)),))

    queries = heads(q_dim)
    found: dict[str, Placement] = {}
    if model.q_lora_rank is None:
        found["linear_q_proj"] = Placement(
            "[h (d_h + d_r), d]", (h * q_dim, d), "heads", "own heads", queries
        )
    else:
        d_q = model.q_lora_rank

        def query_rows(share: Share) -> tuple[Box, ...]:
            return ((share.query_latent,),)

        found["linear_q_down_proj"] = Placement(
            "[d_q, d]", (d_q, d), "rows", "whole on every rank", query_rows
        )
        found["q_norm"] = Placement(
            "[d_q]",
            (d_q,),
            "as the rows; gathered with them, as one more token",
            "whole on every rank",
            query_rows,
        )
        found["linear_q_up_proj"] = Placement(
            "[h (d_h + d_r), d_q]", (h * q_dim, d_q), "heads", "own heads", queries
        )
    if model.query_head_norm:
        found["query_head_norm"] = Placement(
            "[h (d_h + d_r)]", (h * q_dim,), "heads", "own heads", queries
        )
    found["linear_kv_down_proj"] = Placement(
        "[d_c + d_r, d]",
        (d_c + d_r, d),
        "latent rows and RoPE-key rows, each by rank",
        "own latents' rows; RoPE-key rows on every rank",
        down_rows,
    )
    found["kv_norm"] = Placement(
        "[d_c]",
        (d_c,),
        "as the latent rows; gathered with them at tp > L",
        "own latents",
        latent_rows,
    )
    found["linear_kv_up_proj"] = Placement(
        "[N, h, d_h + d_v, d_l]",
        (model.num_branches, h, d_h + d_v, d_l),
        "`head`: axis 1; `latent`: axis 0, then axis 1 at tp > N",
        "as the `latent` layout",
        lambda share: ((share.branches, share.core_heads),),
    )
    if model.output_gate:
        found["linear_gate_proj"] = Placement(
            "[h d_v, d]", (h * d_v, d), "heads", "own heads", heads(d_v)
        )
    found["linear_proj"] = Placement(
        "[d, h d_v]",
        (d, h * d_v),
        "heads (row-parallel)",
        "own heads",
        lambda share: ((slice(0, d), _scaled(share.heads, d_v)),),
    )
    return found


def local_shape(placement: Placement, share: Share) -> tuple[int, ...]:
    """The shape of a rank's local weight."""
    parts = [
        tuple(map(_length, box)) + placement.shape[len(box) :] for box in placement.boxes(share)
    ]
    return (sum(part[0] for part in parts), *parts[0][1:])


def _run(start: int, count: int) -> slice:
    return slice(start, start + count)


def _length(part: slice) -> int:
    return part.stop - part.start


def _scaled(part: slice, size: int) -> slice:
    return slice(part.start * size, part.stop * size)
