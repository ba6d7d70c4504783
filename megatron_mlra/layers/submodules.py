"""What the attentions of this project are built from: their linears and their core."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.tensor_parallel.layers import RowParallelLinear

from megatron_mlra.layers.projections import LatentColumnParallelLinear


@dataclass
class AttentionSubmodules:
    """The submodules of an attention; `attention_submodules` makes the sets."""

    column_linear: type
    """Column-parallel linear without communication of its input: down, query, gate projections."""

    core_attention: type
    """See core_attention.py."""

    linear_proj: type
    """Row-parallel output projection."""


def attention_submodules(use_te: bool, core_attention: type) -> AttentionSubmodules:
    """A core with the linears of Transformer Engine, or with torch's."""
    if not use_te:
        return AttentionSubmodules(LatentColumnParallelLinear, core_attention, RowParallelLinear)
    from megatron.core.extensions.transformer_engine import TERowParallelLinear

    from megatron_mlra.layers.transformer_engine import TELatentColumnParallelLinear

    return AttentionSubmodules(TELatentColumnParallelLinear, core_attention, TERowParallelLinear)
