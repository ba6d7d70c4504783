"""Where every weight lies: its global shape, and the part of it that each rank holds.

One table, `placements`. Training's modules and checkpoints, the cutting of inference, the dry run
and docs/parallelism.md read it. Pure Python.

Letters: V vocabulary, d hidden size, f hidden size of an MLP, h attention heads, L latent heads, N
branches, G = L / N head groups, d_q, d_c, d_l = d_c / L, d_h, d_r, d_v as in docs/notation.md; g
key/value heads and c head dim of grouped queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.sharding.partition import LatentShard

OPTIONAL = ("query_head_norm", "linear_gate_proj")
"""Weights that a switch adds."""

Box = tuple[slice, ...]
"""A part of a global tensor, one slice per leading axis; later axes are whole."""


@dataclass(frozen=True)
class Share:
    """What of a layer's attention one rank holds, in rows of the global weights."""

    query_latent: slice
    """Rows of the query latent, of d_q."""
    latents: tuple[slice, ...]
    """Rows of the latents, of d_c: one slice per run of latents that lie side by side."""
    rope: slice
    """Rows of the RoPE key, of d_r."""
    heads: slice
    """Heads whose query, gate and output projections the rank holds, of h."""
    branches: slice
    """Branches of the core's (branch, head) pairs, of N."""
    core_heads: slice
    """Heads of the core's pairs, of h."""


@dataclass(frozen=True)
class Placement:
    """One weight."""

    letters: str
    """Global shape in letters."""
    shape: tuple[int, ...]
    """Global shape."""
    cut: str
    """How training cuts it, in words."""
    served: str
    """How inference cuts it, in words."""
    boxes: Callable[[Share], tuple[Box, ...]]
    """A rank's parts, which its local weight joins along the first axis."""


def training_share(model: ModelDescription, shard: LatentShard) -> Share:
    """The rank's share in training, in the layout that `shard` was planned for.

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
    """The rank's share in inference: the latents its core reads, the whole query latent and RoPE
    key, and the projections of `own_heads` heads from `own_start` on."""
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
    """Every weight of a layer's latent attention, by the name of its module.

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
            "as the rows; one sum of squares per token is all-reduced",
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
        "[d_c]", (d_c,), "as the latent rows; local unless tp > L", "own latents", latent_rows
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
    """The shape of a rank's part."""
    parts = [
        tuple(map(_length, box)) + placement.shape[len(box) :] for box in placement.boxes(share)
    ]
    return (sum(part[0] for part in parts), *parts[0][1:])


def markdown_table(model: ModelDescription) -> str:
    """The table of docs/parallelism.md."""
    lines = ["| parameter | global shape | training | inference |", "|---|---|---|---|"]
    for name, placed in placements(model).items():
        shown = f"`{name}`" + " (optional)" * (name in OPTIONAL)
        lines.append(f"| {shown} | `{placed.letters}` | {placed.cut} | {placed.served} |")
    return "\n".join(lines)


def _run(start: int, count: int) -> slice:
    return slice(start, start + count)


def _length(part: slice) -> int:
    return part.stop - part.start


def _scaled(part: slice, size: int) -> slice:
    return slice(part.start * size, part.stop * size)
