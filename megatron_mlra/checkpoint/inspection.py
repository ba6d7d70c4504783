"""What `inspect` prints of a checkpoint."""

from __future__ import annotations

import math

from megatron_mlra.checkpoint.folders import CheckpointFolder
from megatron_mlra.checkpoint.names import expected_tensors


def lines(folder: CheckpointFolder) -> list[str]:
    """A summary of the model, then every kind of tensor with its shape and how many there are."""
    m = folder.description
    shapes = expected_tensors(m)
    count = sum(math.prod(shape) for shape in shapes.values())
    embedding = "tied" if m.tie_embeddings else "untied"
    out = [
        f"{folder.path}: {folder.kind} checkpoint of {m.variant}, {count:,} parameters, {m.dtype}",
        f"{m.num_layers} layers, hidden {m.hidden_size}, ffn {m.ffn_hidden_size},"
        f" {m.num_attention_heads} heads, vocabulary {m.vocab_size} ({embedding}),"
        f" {m.max_position_embeddings} positions, RoPE {m.rope_type} base {m.rotary_base:g},"
        f" eps {m.layernorm_epsilon:g}",
    ]
    if m.attention == "latent":
        query = m.q_lora_rank if m.q_lora_rank is not None else "none"
        scaling = "on" if m.variance_scaling else "off"
        out.append(
            f"{m.num_latent_heads} latents of {m.latent_dim}, {m.num_branches} branches, query rank"
            f" {query}, head dims {m.qk_nope_head_dim} + {m.qk_rope_head_dim} RoPE, value"
            f" {m.v_head_dim}, variance scaling {scaling}"
        )
    else:
        out.append(f"{m.num_query_groups} key/value heads of {m.head_dim}")
    step = getattr(folder, "iteration", None)
    if step is not None:
        out.append(f"step {step:,}")
    files = ", ".join(path.name for path in folder.tokenizer_files())
    out.append(f"tokenizer: {m.tokenizer_type or 'not named'}, files: {files or 'none'}")
    first = "decoder.layers.0."
    for name, shape in shapes.items():
        if name.startswith(first):
            rest = name.removeprefix(first)
            out.append(f"  decoder.layers.*.{rest} {list(shape)} x {m.num_layers}")
        elif not name.startswith("decoder.layers."):
            out.append(f"  {name} {list(shape)}")
    return out
