"""The forward pass of a checkpoint, layer by layer. Memory holds one layer, and one of its routed
experts at a time.

Plain torch over `maths/attention.py`, in float32. Letters: s tokens, b sequences, d hidden size, h
query heads, g key/value heads, c head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from megatron_mlra.checkpoint.folder import CheckpointFolder
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.tensors import (
    EMBEDDING,
    EXPERT_BIAS,
    EXPERTS,
    FINAL_NORM,
    OUTPUT,
    layer_prefix,
    layer_tensors,
)
from megatron_mlra.maths.attention import attend, mlra_attention
from megatron_mlra.maths.norms import rms_norm
from megatron_mlra.maths.rope import apply_rope, rotary_tables, unrotated
from megatron_mlra.maths.routing import choose_experts

ROWS = 8192
"""Rows of the output weight that are multiplied at a time, which bounds the memory in float32."""


def hidden_states(folder: CheckpointFolder, tokens: Tensor) -> Iterator[Tensor]:
    """Yield the embedding, then the output of every layer, `[s, b, d]` float32.

    Args:
        tokens: ids `[b, s]`.
    """
    model = folder.description
    angles = rotary_tables(model, tokens.size(1))
    still = unrotated(*angles)
    x = folder.tensor(EMBEDDING)[tokens.T].float()
    yield x
    for i in range(model.num_layers):

        def read(name: str, prefix: str = layer_prefix(i)) -> Tensor:
            return folder.tensor(prefix + name).float()

        weights = {
            name.removesuffix(".weight"): read(name)
            for name in layer_tensors(model, i)
            if not name.startswith(EXPERTS)
        }
        x = attention_block(x, weights, model, angles if model.rotates(i) else still)
        normed = rms_norm(x, weights["pre_mlp_layernorm"], model.layernorm_epsilon)
        mlp = partial(experts, read=read) if model.is_moe(i) else swiglu
        x = x + mlp(normed, weights, model)
        yield x


def attention_block(
    x: Tensor, weights: dict[str, Tensor], model: ModelDescription, angles: tuple[Tensor, Tensor]
) -> Tensor:
    """Norm, attention and residual, `[s, b, d]` -> `[s, b, d]`."""
    normed = rms_norm(x, weights["input_layernorm"], model.layernorm_epsilon)
    prefix = "self_attention."
    attention = {
        name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)
    }
    if model.attention == "gqa":
        return x + grouped_attention(normed, attention, model, angles)
    absorbed = model.latent_dim <= model.qk_nope_head_dim
    return x + mlra_attention(normed, attention, model, absorbed=absorbed, angles=angles)


def swiglu(
    x: Tensor, weights: dict[str, Tensor], _: ModelDescription, prefix: str = "mlp."
) -> Tensor:
    """A dense MLP or the shared experts, `[..., d]` -> `[..., d]`: W2 (silu(W_gate x) * W_up x)."""
    gate, up = (x @ weights[f"{prefix}linear_fc1"].T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ weights[f"{prefix}linear_fc2"].T


def experts(
    x: Tensor,
    weights: dict[str, Tensor],
    model: ModelDescription,
    read: Callable[[str], Tensor],
) -> Tensor:
    """Routed and shared experts, `[s, b, d]` -> `[s, b, d]`.

    Args:
        read: reads a weight of the layer, so that only chosen experts are read.
    """
    tokens = x.flatten(0, 1)
    bias = weights.get(EXPERT_BIAS)
    scales, chosen = choose_experts(tokens, weights["mlp.router"], bias, model)
    out = torch.zeros_like(tokens)
    for e in chosen.unique().tolist():
        names = ("linear_fc1", "linear_fc2")
        expert = {name: read(f"{EXPERTS}{e}.{name}.weight") for name in names}
        rows, slots = (chosen == e).nonzero(as_tuple=True)
        part = swiglu(tokens[rows], expert, model, prefix="")
        out.index_add_(0, rows, part * scales[rows, slots, None])
    out = out.view_as(x)
    if model.moe_shared_expert_intermediate_size:
        out = out + swiglu(x, weights, model, prefix="mlp.shared_experts.")
    return out


def grouped_attention(
    x: Tensor, weights: dict[str, Tensor], model: ModelDescription, angles: tuple[Tensor, Tensor]
) -> Tensor:
    """MHA, GQA or MQA, `[s, b, d]` -> `[s, b, d]`.

    The rows of `linear_qkv` are ordered by query group: queries, gates, one key, one value.
    """
    s, b, _ = x.shape
    g, c = model.num_query_groups, model.head_dim
    j = model.num_attention_heads // g
    sizes = [j, j, 1, 1] if model.output_gate else [j, 1, 1]
    parts = (x @ weights["linear_qkv"].T).view(s, b, g, sum(sizes), c).split(sizes, dim=3)
    query, *gate, key, value = (part.flatten(2, 3) for part in parts)  # [s, b, heads, c]
    query, key = apply_rope(query, *angles), apply_rope(key, *angles)
    out = attend(query, key, value, model.softmax_scale)
    if gate:
        out = out * torch.sigmoid(gate[0])
    return out.flatten(2) @ weights["linear_proj"].T


def logits(folder: CheckpointFolder, x: Tensor) -> Tensor:
    """Logits `[s, b, V]` of the last layer's output `x` `[s, b, d]`."""
    return output_head(folder)(x)


def output_head(folder: CheckpointFolder) -> Callable[[Tensor], Tensor]:
    """A function of the final norm and the output weight, which are read once: the last layer's
    output `[..., d]` -> logits `[..., V]`."""
    model = folder.description
    norm = folder.tensor(FINAL_NORM).float()
    output = folder.tensor(EMBEDDING if model.tie_embeddings else OUTPUT)

    def head(x: Tensor) -> Tensor:
        x = rms_norm(x, norm, model.layernorm_epsilon)
        return torch.cat([x @ rows.float().T for rows in output.split(ROWS)], dim=-1)

    return head
