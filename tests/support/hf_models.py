"""Exported models with random weights, and prompts for them."""

from __future__ import annotations

import torch

from megatron_mlra.hf.configuration_mlra import MLRAConfig
from megatron_mlra.hf.modeling_mlra import MLRAForCausalLM


def build(variant="MLRA-4", **changes):
    """A two-layer model with random weights that are far from zero."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 32,
        "v_head_dim": 24,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    return MLRAForCausalLM(MLRAConfig(**(sizes | VARIANTS[variant] | changes))).eval()


def prompts(*lengths):
    """Left-padded random prompts and their mask."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 97, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return tokens * mask, mask


VARIANTS = {
    "MLA": {"num_latent_heads": 1, "num_branches": 1},
    "GLA-2": {"num_latent_heads": 2, "num_branches": 1, "output_gate": True},
    "GLA-4": {"num_latent_heads": 4, "num_branches": 1, "rope_layer_types": ["nope", "rope"]},
    "MLRA-2": {
        "num_latent_heads": 4,
        "num_branches": 2,
        "variance_scaling": False,
        "query_head_norm": True,
    },
    "MLRA-4": {"num_latent_heads": 4, "num_branches": 4, "output_gate": True},
    "MLRA-4 experts": {
        "num_latent_heads": 4,
        "num_branches": 4,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "MLRA-8": {"num_latent_heads": 8, "num_branches": 8, "kv_lora_rank": 512, "q_lora_rank": None},
}
