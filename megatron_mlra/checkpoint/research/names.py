"""The table of canonical tensor names and layouts, and those of the paper's research code.

Letters: N branches, G head groups, L = N G latents, h heads, j heads of a group, e = d_h + d_v,
l latent dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mlra.checkpoint.rules import Rule, grouped_queries, rows, same, whole_table
from megatron_mlra.description.model import ModelDescription

RESEARCH_EMBEDDING = "transformer.wte.weight"
RESEARCH_OUTPUT = "lm_head.weight"


def rules(model: ModelDescription) -> dict[str, Rule]:
    """Canonical name -> rule, for every tensor of the model, in canonical order."""
    layer = _layer(model)
    return whole_table(
        model,
        lambda _: layer,
        embedding=RESEARCH_EMBEDDING,
        prefix="transformer.h.{}.",
        final_norm="layernorm.weight",
        output=RESEARCH_OUTPUT,
    )


def _layer(model: ModelDescription) -> dict[str, Rule]:
    attention = _grouped(model) if model.attention == "gqa" else _latent(model)
    return {
        "input_layernorm.weight": same("input_layernorm.weight"),
        **{f"self_attention.{name}.weight": rule for name, rule in attention.items()},
        "pre_mlp_layernorm.weight": same("post_attention_layernorm.weight"),
        # Gate, then up.
        "mlp.linear_fc1.weight": rows("mlp.c_fc1.weight", "mlp.c_fc2.weight"),
        "mlp.linear_fc2.weight": same("mlp.c_proj.weight"),
    }


def _latent(model: ModelDescription) -> dict[str, Rule]:
    table = {
        "linear_q_down_proj": same("attn.q_a_proj.weight"),
        "q_norm": same("attn.q_a_layernorm.weight"),
        "linear_q_up_proj": same("attn.q_b_proj.weight"),
        "linear_kv_down_proj": same("attn.kv_a_proj_with_mqa.weight"),
    }
    L, N = model.num_latent_heads, model.num_branches
    if L == 1:
        table["kv_norm"] = same("attn.kv_a_layernorm.weight")
        table["linear_kv_up_proj"] = _linears(model, "attn.kv_b_proj.weight")
    elif (L, N) == (2, 1):
        table["kv_norm"] = rows(*(f"attn.kv_a_layernorm_{l}.weight" for l in (1, 2)))
        names = (f"attn.kv_b_proj_{l}.weight" for l in (1, 2))
        table["linear_kv_up_proj"] = _linears(model, *names)
    else:
        table["kv_norm"] = rows(*(f"attn.kv_a_layernorms.{l}.weight" for l in range(L)))
        table["linear_kv_up_proj"] = _one_parameter(model)
    if model.output_gate:
        table["linear_gate_proj"] = same("attn.gated_proj.weight")
    return table | {"linear_proj": same("attn.c_proj.weight")}


def _grouped(model: ModelDescription) -> dict[str, Rule]:
    names = ["attn.c_q.weight", "attn.c_k.weight", "attn.c_v.weight"]
    if model.output_gate:
        names.insert(1, "attn.gated_proj.weight")
    return {
        "linear_qkv": grouped_queries(model, *names),
        "linear_proj": same("attn.c_proj.weight"),
    }


def _linears(model: ModelDescription, *names: str) -> Rule:
    """One Linear `[j e, l]` per latent, of a single branch; canonical `[1, h, e, l]`."""
    h, l = model.num_attention_heads, model.latent_dim

    def split(weight: Tensor) -> list[Tensor]:
        return list(weight.view(-1, l).chunk(len(names)))

    return Rule(names, split, lambda parts: torch.cat(parts).view(1, h, -1, l))


def _one_parameter(model: ModelDescription) -> Rule:
    """One parameter `[L, l, j e]`, latent = branch * G + group; canonical `[N, h, e, l]`."""
    N, G, l = model.num_branches, model.num_head_groups, model.latent_dim
    h = model.num_attention_heads
    j = h // G

    def split(weight: Tensor) -> list[Tensor]:
        e = weight.size(2)
        theirs = weight.view(N, G, j, e, l).permute(0, 1, 4, 2, 3)  # [N, G, l, j, e]
        return [theirs.reshape(N * G, l, j * e)]

    def join(parts: list[Tensor]) -> Tensor:
        ours = parts[0].view(N, G, l, j, -1).permute(0, 1, 3, 4, 2)  # [N, G, j, e, l]
        return ours.reshape(N, h, -1, l)

    return Rule(("attn.kv_b_proj",), split, join)
