"""Descriptions of the models with which Hugging Face exports are tested. Imports no Megatron."""

from __future__ import annotations

from megatron_mlra.description.model import ModelDescription
from support.random_checkpoint import grouped, latent

YARN = {
    "rope_type": "yarn",
    "rotary_scaling_factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.1,
    "mscale_all_dim": 0.7,
}
EXPERTS = {
    "num_experts": 5,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_layer_pattern": (0, 1),
}
SHARED_EXPERT = EXPERTS | {
    "moe_router_pre_softmax": True,
    "moe_shared_expert_intermediate_size": 40,
}
SIGMOID_EXPERTS = EXPERTS | {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_dtype": "fp32",
}
CASES: dict[str, ModelDescription] = {
    "MLA": latent(1, 1),
    "GLA-2": latent(2, 1, tie_embeddings=False),
    "GLA-4": latent(4, 1, output_gate=True),
    "MLRA-2": latent(4, 2, q_lora_rank=None, query_head_norm=True),
    "MLRA-4": latent(4, 4),
    "MLRA-4-gated-untied": latent(4, 4, output_gate=True, tie_embeddings=False),
    "MLRA-4-unscaled": latent(
        4, 4, variance_scaling=False, rotary_base=5e5, no_rope_pattern=(0, 1)
    ),
    "MLRA-4-nope": latent(4, 4, qk_rope_head_dim=0),
    "MLRA-8-yarn": latent(8, 8, v_head_dim=8, query_head_norm=True, **YARN),
    "MLRA-4-experts": latent(4, 4, tie_embeddings=False, **SHARED_EXPERT),
    "MLA-experts": latent(1, 1, **EXPERTS | {"moe_layer_pattern": (1, 1)}),
    "GLA-2-sigmoid-experts": latent(2, 1, **SIGMOID_EXPERTS),
    "MHA": grouped(8, tie_embeddings=False),
    "GQA": grouped(2, rotary_base=5e5),
    "MQA": grouped(1),
}
