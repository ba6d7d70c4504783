"""The sharding of an attention's weights: which part of an exported tensor fills which parameter.

Constant factors are multiplied into the weights here, once. Weights that are not loaded
(`load_format="dummy"`) are random numbers, where a missing factor does not matter.

Letters, all of the whole model: d hidden size, h heads, L latent heads, N branches, G = L / N head
groups, d_q query rank, d_c latent size, l = d_c / L, r RoPE dim, d_h and d_v sizes of a head's key
(without RoPE) and value, e = d_h + r.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlra_vllm.config import MLRAConfig
from mlra_vllm.shard import Shard

WHOLE = slice(None)


@dataclass(frozen=True)
class Source:
    """One tensor of an exported attention."""

    shape: tuple[int, ...]
    targets: tuple[tuple[str, slice], ...]
    """(Parameter of MLRAAttention, its rows) that each part fills."""
    cut: Callable[[Tensor], tuple[Tensor, ...]]
    """Tensor -> the rank's part for each target."""


def sources(config: MLRAConfig, shard: Shard) -> dict[str, Source]:
    """Name without `self_attn.` -> source, of every tensor of an exported attention."""
    d, h, d_c = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    nope, rope, d_v, l = (
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
        config.latent_dim,
    )
    e, d_q = nope + rope, config.q_lora_rank or 0
    groups = config.num_latent_heads // config.num_branches
    branches = slice(shard.branch_start, shard.branch_start + shard.branches)
    heads = slice(shard.head_start, shard.head_start + shard.heads)

    def of_heads(size: int) -> slice:
        return slice(heads.start * size, heads.stop * size)

    def latents(x: Tensor) -> Tensor:
        """The rows of x `[d_c, ...]` of the rank's latents."""
        own = x.unflatten(0, (config.num_branches, groups, l))
        own = own[branches, shard.group_start : shard.group_start + shard.groups]
        return own.flatten(0, 2)

    def up(x: Tensor) -> tuple[Tensor, Tensor]:
        """W_UK `[h, d_h, n l]` and W_UV `[h, n l, d_v]`, times the scale of the branch sum."""
        own = x[branches, heads]
        w_uk, w_uv = own[:, :, :nope], own[:, :, nope:].float() * config.branch_scale
        return (
            w_uk.permute(1, 2, 0, 3).flatten(2),
            w_uv.permute(1, 0, 3, 2).flatten(1, 2),
        )

    def rows(size: int) -> Callable[[Tensor], tuple[Tensor]]:
        return lambda x: (x[of_heads(size)],)

    table = {
        "kv_a_proj_with_mqa.weight": Source(
            (d_c + rope, d),
            (("down", slice(d_q, None)),),
            lambda x: (torch.cat((latents(x[:d_c]), x[d_c:])),),
        ),
        "kv_a_layernorm.weight": Source(
            (d_c,), (("attn.kv_norm", WHOLE),), lambda x: (latents(x).unflatten(0, (-1, l)),)
        ),
        "kv_b_proj.weight": Source(
            (config.num_branches, h, nope + d_v, l),
            (("attn.w_uk", WHOLE), ("attn.w_uv", WHOLE)),
            up,
        ),
        "o_proj.weight": Source((d, h * d_v), (("proj", WHOLE),), lambda x: (x[:, of_heads(d_v)],)),
    }
    if d_q:
        table["q_a_proj.weight"] = Source((d_q, d), (("down", slice(0, d_q)),), lambda x: (x,))
        table["q_a_layernorm.weight"] = Source(
            (d_q,), (("q_norm.weight", WHOLE),), lambda x: (x.float() * config.q_scale,)
        )
        table["q_b_proj.weight"] = Source((h * e, d_q), (("q_up", WHOLE),), rows(e))
    else:
        table["q_proj.weight"] = Source((h * e, d), (("q_up", WHOLE),), rows(e))
    if config.norms_query_heads:
        table["query_head_norm.weight"] = Source(
            (h * e,),
            (("query_head_norm", WHOLE),),
            lambda x: (x[of_heads(e)].unflatten(0, (-1, e)),),
        )
    if config.output_gate:
        table["g_proj.weight"] = Source((h * d_v, d), (("gate", WHOLE),), rows(d_v))
    return table
