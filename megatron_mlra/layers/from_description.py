"""The transformer config of a described model."""

from __future__ import annotations

from typing import Any

import torch

from megatron_mlra.description.experts import expert_args
from megatron_mlra.description.model import YARN, ModelDescription
from megatron_mlra.layers.baselines.config import BaselineConfig
from megatron_mlra.layers.config import MLRAConfig


def to_config(description: ModelDescription, **overrides: Any) -> MLRAConfig | BaselineConfig:
    """The transformer config: MLRAConfig, or BaselineConfig for 'gqa'.

    `overrides` are fields of that config (layout, precision, backend); they win over the
    description's.
    """
    dtype = getattr(torch, description.dtype)
    fields: dict[str, Any] = {
        name: getattr(description, name)
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "layernorm_epsilon",
            "softmax_scale",
            "rotary_base",
        )
    }
    fields |= {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "no_rope_freq": list(description.no_rope_pattern) or None,
        "bf16": description.dtype == "bfloat16",
        "fp16": description.dtype == "float16",
    }
    experts = expert_args(description)
    if experts:
        fields |= {"num_moe_experts": experts.pop("num_experts"), **experts}
        fields["moe_router_load_balancing_type"] = "none"
    if description.attention == "gqa":
        fields |= {
            "attention": "gqa",
            "num_query_groups": description.num_query_groups,
            "kv_channels": description.head_dim,
            "attention_output_gate": description.output_gate,
        }
        return BaselineConfig(**fields | overrides)
    names = ("num_latent_heads", "num_branches", "q_lora_rank", "kv_lora_rank", "v_head_dim")
    names += ("query_head_norm", "output_gate", "variance_scaling", "rope_type", *YARN)
    fields |= {name: getattr(description, name) for name in names}
    fields |= {
        "qk_head_dim": description.qk_nope_head_dim,
        "qk_pos_emb_head_dim": description.qk_rope_head_dim,
    }
    return MLRAConfig(**fields | overrides)
