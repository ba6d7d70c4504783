"""Names of exported Hugging Face folders, as a table against the canonical ones.

Latent attention has the names of `hf/attention_mlra.py`, grouped queries those of transformers'
Llama.
"""

from __future__ import annotations

from megatron_mlra.checkpoint.rules import Rule, grouped_queries, rows, same, whole_table
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.tensors import EXPERT_BIAS, EXPERTS, layer_tensors

HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"
HF_EXPERT_BIAS = "mlp.gate.e_score_correction_bias"

_ATTENTION = {
    "linear_q_proj": "q_proj",
    "linear_q_down_proj": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "linear_q_up_proj": "q_b_proj",
    "query_head_norm": "query_head_norm",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "linear_kv_up_proj": "kv_b_proj",
    "linear_gate_proj": "g_proj",
    "linear_proj": "o_proj",
}


def rules(model: ModelDescription) -> dict[str, Rule]:
    """Canonical name -> rule, for every tensor of the model, in canonical order."""
    return whole_table(
        model,
        lambda layer: _layer(model, layer),
        embedding=HF_EMBEDDING,
        prefix="model.layers.{}.",
        final_norm="model.norm.weight",
        output=HF_OUTPUT,
    )


def _layer(model: ModelDescription, layer: int) -> dict[str, Rule]:
    tensors = layer_tensors(model, layer)
    attention = {
        f"self_attention.{ours}.weight": same(f"self_attn.{theirs}.weight")
        for ours, theirs in _ATTENTION.items()
    }
    if model.attention == "gqa":
        names = (f"self_attn.{part}_proj.weight" for part in "qkv")
        attention["self_attention.linear_qkv.weight"] = grouped_queries(model, *names)
    return {
        "input_layernorm.weight": same("input_layernorm.weight"),
        **{name: rule for name, rule in attention.items() if name in tensors},
        "pre_mlp_layernorm.weight": same("post_attention_layernorm.weight"),
        **(_experts(model) if model.is_moe(layer) else _mlp("mlp.", "mlp.")),
    }


def _mlp(ours: str, theirs: str) -> dict[str, Rule]:
    return {
        # Gate, then up.
        f"{ours}linear_fc1.weight": rows(f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"),
        f"{ours}linear_fc2.weight": same(f"{theirs}down_proj.weight"),
    }


def _experts(model: ModelDescription) -> dict[str, Rule]:
    table = {"mlp.router.weight": same("mlp.gate.weight")}
    if model.moe_router_enable_expert_bias:
        table[EXPERT_BIAS] = same(HF_EXPERT_BIAS)
    for e in range(model.num_experts):
        table |= _mlp(f"{EXPERTS}{e}.", f"mlp.experts.{e}.")
    if model.moe_shared_expert_intermediate_size:
        table |= _mlp("mlp.shared_experts.", "mlp.shared_experts.")
    return table
