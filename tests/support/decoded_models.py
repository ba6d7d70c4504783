"""The small models whose cached decoding is compared with full forwards, by name."""

from __future__ import annotations

from typing import Any

from megatron_mlra.description.model import ModelDescription

VOCAB = 123
PAGE = 16
"""Tokens of a page of the caches."""
SIZES = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 88,
    "num_attention_heads": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
}
YARN = {
    "rope_type": "yarn",
    "rotary_scaling_factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
EXPERTS = {
    "num_experts": 6,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_layer_pattern": (0, 1),
}


def _latent(latents: int, branches: int, **changes: Any) -> ModelDescription:
    sizes = {**SIZES, **LATENT, "num_latent_heads": latents, "num_branches": branches, **changes}
    return ModelDescription(**sizes)


def _grouped(groups: int, **changes: Any) -> ModelDescription:
    return ModelDescription(
        **{**SIZES, "attention": "gqa", "num_query_groups": groups, "head_dim": 16, **changes}
    )


MODELS: dict[str, ModelDescription] = {
    "MLA": _latent(1, 1),
    "GLA-2": _latent(2, 1),
    "GLA-4": _latent(4, 1),
    "MLRA-2": _latent(4, 2),
    "MLRA-4": _latent(4, 4),
    "MLRA-8": _latent(8, 8),
    "MLA-untied": _latent(1, 1, tie_embeddings=False),
    "MLRA-2-gated": _latent(4, 2, output_gate=True, tie_embeddings=False, query_head_norm=True),
    "MLRA-4-gated": _latent(4, 4, output_gate=True),
    "MLRA-4-unscaled": _latent(4, 4, variance_scaling=False, no_rope_pattern=(1, 0)),
    "MLRA-4-no-q-lora": _latent(4, 4, q_lora_rank=None, query_head_norm=True),
    "MLRA-4-nope": _latent(4, 4, qk_rope_head_dim=0),
    "MLRA-4-yarn": _latent(4, 4, **YARN),
    "MLRA-4-experts": _latent(
        4,
        4,
        moe_router_pre_softmax=True,
        moe_shared_expert_intermediate_size=40,
        **EXPERTS,
    ),
    "MLA-sigmoid-experts": _latent(
        1,
        1,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=2.5,
        moe_router_dtype="fp32",
        **EXPERTS | {"moe_layer_pattern": (1, 1)},
    ),
    "GQA-experts": _grouped(4, **EXPERTS, moe_shared_expert_intermediate_size=40),
    "GQA": _grouped(4),
    "GQA-gated": _grouped(4, output_gate=True, tie_embeddings=False),
    "MHA": _grouped(8),
    "MQA": _grouped(1),
}
