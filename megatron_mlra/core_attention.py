"""Backends of the core attention: torch's scaled_dot_product_attention, Transformer Engine's.

Each takes query `[s, b, heads, d_k]`, key `[s, b, kv_heads, d_k]`, value `[s, b, kv_heads, d_v]`
(grouped queries) and returns `[s, b, heads * d_v]`. Which one runs is chosen in layer_specs.py,
never here.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_mlra.config import MLRAConfig
from megatron_mlra.sharding import LatentShard

if HAVE_TE:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention


class SDPACoreAttention(MegatronModule):
    """Causal attention by torch, on CPU and CUDA.

    Raises:
        ValueError: for packed sequences and attention biases, which need another backend.
    """

    def __init__(
        self,
        config: MLRAConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float,
        cp_comm_type: str | None = None,
        pg_collection=None,
    ) -> None:
        super().__init__(config)
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
    ) -> Tensor:
        """See the module's docstring; `attention_mask` `[b or 1, 1, s, s]`, True where not attended
        to, replaces the causal mask (reset attention masks)."""
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError(
                "core_backend sdpa takes neither packed sequences nor attention biases"
            )
        d_v = value.size(-1)
        # torch's fused kernels want one head dim for all three, on CPU no grouped queries either.
        width = max(key.size(-1), d_v)
        query, key, value = (
            x if x.size(-1) == width else pad(x, (0, width - x.size(-1)))
            for x in (query, key, value)
        )
        if not query.is_cuda:
            repeats = query.size(2) // key.size(2)
            key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        with _dropout_rng(dropout, self.config.sequence_parallel):
            out = scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=dropout,
                is_causal=attention_mask is None,
                scale=self.softmax_scale,
                enable_gqa=q.size(1) != k.size(1),
            )
        return out[..., :d_v].permute(2, 0, 1, 3).flatten(2)


def _dropout_rng(dropout: float, sequence_parallel: bool):
    """The random state of Megatron's own core attention: per TP rank, except under sequence
    parallel."""
    if dropout == 0.0 or sequence_parallel:
        return nullcontext()
    return get_cuda_rng_tracker().fork()


def te_core_attention(
    config: MLRAConfig,
    layer_number: int,
    attn_mask_type: AttnMaskType,
    attention_type: str,
    softmax_scale: float,
    cp_comm_type: str | None = None,
    pg_collection=None,
):
    """Transformer Engine's attention, sized for this rank's (branch, head) pairs.

    Transformer Engine divides heads and groups by the TP size, so both are given times it.
    """
    group = pg_collection.tp
    shard = LatentShard.plan(config, group.size(), group.rank())
    queries = shard.branches * shard.heads
    sized = copy.copy(config)
    sized.num_attention_heads = queries * shard.tp_size
    if config.absorbed:
        k_channels, v_channels = config.latent_dim + config.qk_rope_head_dim, config.latent_dim
        sized.num_query_groups = shard.branches * shard.groups * shard.tp_size
    else:
        k_channels, v_channels = config.qk_dim, config.v_head_dim
        sized.num_query_groups = sized.num_attention_heads
    return TEDotProductAttention(
        config=sized,
        layer_number=layer_number,
        attn_mask_type=attn_mask_type,
        attention_type=attention_type,
        softmax_scale=softmax_scale,
        k_channels=k_channels,
        v_channels=v_channels,
        cp_comm_type=cp_comm_type,
        pg_collection=pg_collection,
    )
