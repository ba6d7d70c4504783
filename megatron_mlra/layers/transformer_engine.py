"""Transformer Engine's linear and core attention as submodules of this project's attentions.

Imported only where Transformer Engine is installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention, TELinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor

from megatron_mlra.layers.config import MLRAConfig
from megatron_mlra.layers.logits import LargestLogits
from megatron_mlra.maths.logits import largest_logits
from megatron_mlra.sharding.partition import LatentShard
from megatron_mlra.sharding.token_plan import TokenPlan


class TELatentColumnParallelLinear(TELinear):
    """Column-parallel te.Linear that leaves its input's communication to LatentParallel.

    Transformer Engine gets a linear of this rank's rows without a tensor-parallel group. The mode
    "column" marks the weight as tensor-parallel and draws it from the rank's own random state.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config,
        init_method: Callable[[Tensor], None],
        gather_output: bool,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_group,
        name: str | None = None,
    ) -> None:
        assert not gather_output and not bias and not is_expert
        config = copy.copy(config)
        # Its user buffers would overlap a communication that this linear does not have.
        config.tp_comm_overlap = False
        super().__init__(
            input_size,
            divide(output_size, tp_group.size()),
            parallel_mode="column",
            config=config,
            init_method=init_method,
            bias=False,
            skip_bias_add=skip_bias_add,
            skip_weight_param_allocation=False,
            tp_group=None,
            name=name,
        )
        self._tp_group = tp_group

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """`weight`, rows split over the tensor-parallel group."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class TECoreAttention(TEDotProductAttention):
    """Transformer Engine's attention over the spans of a TokenPlan.

    Torch computes the largest logits, by one more product of queries and keys. Transformer Engine's
    own report of largest logits chooses other kernels and has not been tried with these masks.
    """

    def __init__(self, *args, softmax_scale: float, **named) -> None:
        super().__init__(*args, softmax_scale=softmax_scale, **named)
        self.logit_scale = softmax_scale
        self.largest = LargestLogits()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        plan: TokenPlan | None = None,
    ) -> Tensor:
        """See core_attention.py; no mask is taken."""
        if self.largest.wanted_of(self):
            spans = None if plan is None else plan.spans
            self.largest.add(largest_logits(query, key, self.logit_scale, spans))
        if plan is None or plan.is_whole:
            return super().forward(query, key, value, None, AttnMaskType.causal)
        if plan.is_packed:
            return self._packed(query, key, value, plan)
        parts = [
            super(TECoreAttention, self).forward(
                query[a:b],
                key[start:stop],
                value[start:stop],
                None,
                AttnMaskType.causal_bottom_right,
            )
            for a, b, start, stop in plan.spans
        ]
        return torch.cat(parts)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, plan: TokenPlan) -> Tensor:
        """One variable-length call for all spans; keys that several spans read are copied."""
        varlen = plan.varlen
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        if varlen.key_index is not None:
            key, value = (x.index_select(0, varlen.key_index) for x in (key, value))
        # Megatron's own forward knows no bottom-right mask of packed sequences.
        out = super(TEDotProductAttention, self).forward(
            query,
            key,
            value,
            None,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            cu_seqlens_q=varlen.cu_seqlens_q,
            cu_seqlens_kv=varlen.cu_seqlens_kv,
            max_seqlen_q=varlen.max_seqlen_q,
            max_seqlen_kv=varlen.max_seqlen_kv,
        )
        return out.unsqueeze(1)


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

    Transformer Engine divides heads and groups by the TP size, so both are multiplied by it here.
    Transformer Engine's own context parallelism is off: latents are gathered before the core.
    """
    group = pg_collection.tp
    shard = LatentShard.plan(config, group.size(), group.rank())
    queries = shard.branches * shard.heads
    sized = copy.copy(config)
    sized.num_attention_heads = queries * shard.tp_size
    sized.context_parallel_size = 1
    # With these set, Megatron makes Transformer Engine return (output, largest logits).
    sized.qk_clip = sized.log_max_attention_logit = False
    if config.absorbed:
        k_channels, v_channels = config.latent_dim + config.qk_rope_head_dim, config.latent_dim
        sized.num_query_groups = shard.branches * shard.groups * shard.tp_size
    else:
        k_channels, v_channels = config.qk_dim, config.v_head_dim
        sized.num_query_groups = sized.num_attention_heads
    return TECoreAttention(
        config=sized,
        layer_number=layer_number,
        attn_mask_type=attn_mask_type,
        attention_type=attention_type,
        softmax_scale=softmax_scale,
        k_channels=k_channels,
        v_channels=v_channels,
        pg_collection=pg_collection,
    )
