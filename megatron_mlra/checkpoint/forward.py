"""Logits of a checkpoint, layer by layer: memory holds one layer, whatever the model's size.

Plain torch over `functional.py`, in float32. Letters: s tokens, b sequences, d hidden size, h query
heads, g key/value heads, c head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_mlra.checkpoint.description import ModelDescription
from megatron_mlra.checkpoint.folders import CheckpointFolder
from megatron_mlra.checkpoint.names import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    layer_prefix,
    layer_tensors,
)
from megatron_mlra.checkpoint.rotary import rotary_tables
from megatron_mlra.functional import apply_rope, attend, mlra_attention, rms_norm

ROWS = 8192
"""Rows of the vocabulary that are multiplied at a time."""


def hidden_states(folder: CheckpointFolder, tokens: Tensor) -> Iterator[Tensor]:
    """The embedding, then the state behind every layer, `[s, b, d]` float32.

    Args:
        tokens: `[b, s]` ids.
    """
    model = folder.description
    angles = rotary_tables(model, tokens.size(1))
    x = folder.tensor(EMBEDDING)[tokens.T].float()
    yield x
    for i in range(model.num_layers):
        weights = {
            name.removesuffix(".weight"): folder.tensor(layer_prefix(i) + name).float()
            for name in layer_tensors(model)
        }
        x = layer(x, weights, model, angles)
        yield x


def layer(
    x: Tensor, weights: dict[str, Tensor], model: ModelDescription, angles: tuple[Tensor, Tensor]
) -> Tensor:
    """One transformer layer, `[s, b, d]` -> `[s, b, d]`."""
    eps = model.layernorm_epsilon
    normed = rms_norm(x, weights["input_layernorm"], eps)
    prefix = "self_attention."
    attention = {
        name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)
    }
    if model.attention == "gqa":
        x = x + grouped_attention(normed, attention, model, angles)
    else:
        x = x + mlra_attention(
            normed,
            attention,
            model,
            absorbed=model.latent_dim <= model.qk_nope_head_dim,
            angles=angles,
        )
    normed = rms_norm(x, weights["pre_mlp_layernorm"], eps)
    gate, up = (normed @ weights["mlp.linear_fc1"].T).chunk(2, dim=-1)
    return x + (torch.nn.functional.silu(gate) * up) @ weights["mlp.linear_fc2"].T


def grouped_attention(
    x: Tensor, weights: dict[str, Tensor], model: ModelDescription, angles: tuple[Tensor, Tensor]
) -> Tensor:
    """MHA, GQA or MQA on `[s, b, d]`, from `linear_qkv` and `linear_proj` (see names.py)."""
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
    """`[s, b, V]` of the state behind the last layer."""
    return output_head(folder)(x)


def output_head(folder: CheckpointFolder) -> Callable[[Tensor], Tensor]:
    """Final norm and output weight, read once: state `[..., d]` -> logits `[..., V]`."""
    model = folder.description
    norm = folder.tensor(FINAL_NORM).float()
    output = folder.tensor(EMBEDDING if model.tie_embeddings else OUTPUT)

    def head(x: Tensor) -> Tensor:
        x = rms_norm(x, norm, model.layernorm_epsilon)
        return torch.cat([x @ rows.float().T for rows in output.split(ROWS)], dim=-1)

    return head
