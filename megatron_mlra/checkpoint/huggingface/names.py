"""The table of canonical tensor names and those of Hugging Face folders.

Models with latent attention have the names of `hf/attention_mlra.py`, models with grouped queries
those of transformers' Llama.
"""

from __future__ import annotations

from megatron_mlra.checkpoint.rules import Rule, grouped_queries, rows, same, under, whole_table
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.tensors import (
    EXPERT_BIAS,
    EXPERTS,
    MULTI_TOKEN_LAYER,
    layer_tensors,
    multi_token_prefix,
)

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
_PREFIX = "model.layers.{}."
_AHEAD = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "final_layernorm.weight": "shared_head.norm.weight",
}
"""Of a layer of multi-token prediction what a layer of the decoder has not, in DeepSeek-V3's names.
Embedding and output layer are the decoder's, of which DeepSeek-V3's files hold copies."""


def rules(model: ModelDescription) -> dict[str, Rule]:
    """Canonical name -> rule, for every tensor of the model, in canonical order.

    Layers of multi-token prediction are numbered behind the decoder's, as DeepSeek-V3's are.
    """
    table = whole_table(
        model,
        lambda layer: _layer(model, layer),
        embedding=HF_EMBEDDING,
        prefix=_PREFIX,
        final_norm="model.norm.weight",
        output=HF_OUTPUT,
    )
    for i in range(model.draft_layers):
        own = {ours: same(theirs) for ours, theirs in _AHEAD.items()}
        last = _layer(model, model.num_layers - 1)
        own |= {MULTI_TOKEN_LAYER + name: rule for name, rule in last.items()}
        table |= under(own, multi_token_prefix(i), _PREFIX.format(model.num_layers + i))
    return table


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
