"""The text that `mlra inspect` prints."""

from __future__ import annotations

import math
import re
from collections import Counter

from megatron_mlra.checkpoint.folder import CheckpointFolder
from megatron_mlra.checkpoint.tokenizer import data_tokenizer
from megatron_mlra.description.model import CheckpointError
from megatron_mlra.description.tensors import expected_tensors, multi_token_tensors


def lines(folder: CheckpointFolder) -> list[str]:
    """A summary of the model, then the name, shape and number of every kind of tensor."""
    m = folder.description
    shapes = expected_tensors(m)
    ahead = set(multi_token_tensors(m, m.draft_layers))
    parameters = {name: math.prod(shape) for name, shape in shapes.items()}
    count = sum(n for name, n in parameters.items() if name not in ahead)
    embedding = "tied" if m.tie_embeddings else "untied"
    rope = f"{'YaRN' if m.rope_type == 'yarn' else 'RoPE'} base {m.rotary_base:g}"
    if m.attention == "mlra" and not m.qk_rope_head_dim:
        rope = "no RoPE (NoPE)"
    elif without := sum(m.no_rope_pattern):
        rope += f" (none in {without} of {m.num_layers} layers)"
    padding = (m.embedding_rows - m.vocab_size) * m.hidden_size * (2 - m.tie_embeddings)
    padded = f" (+{padding:,} of padding rows of the vocabulary)" if padding > 0 else ""
    out = [
        f"{folder.path}: {folder.kind} checkpoint of {m.variant}, {count:,} parameters{padded},"
        f" {m.dtype}",
        f"{m.num_layers} layers, hidden {m.hidden_size}, ffn {m.ffn_hidden_size},"
        f" {m.num_attention_heads} heads, vocabulary {m.vocab_size} ({embedding}),"
        f" {m.max_position_embeddings} positions, {rope},"
        f" eps {m.layernorm_epsilon:g}",
    ]
    if m.attention == "mlra":
        query = m.q_lora_rank if m.q_lora_rank is not None else "none"
        scaling = "on" if m.variance_scaling else "off"
        norm = ", norm of query heads" * m.query_head_norm
        out.append(
            f"{m.num_latent_heads} latents of {m.latent_dim}, {m.num_branches} branches, query rank"
            f" {query}, head dims {m.qk_nope_head_dim} + {m.qk_rope_head_dim} RoPE, value"
            f" {m.v_head_dim}, variance scaling {scaling}{norm}"
        )
    else:
        out.append(f"{m.num_query_groups} key/value heads of {m.head_dim}")
    if m.num_experts:
        out.append(
            f"{sum(m.moe_layer_pattern)} layers of {m.num_experts} experts of"
            f" {m.moe_ffn_hidden_size}, shared {m.moe_shared_expert_intermediate_size}:"
            f" {'' if m.normalizes_topk else 'unnormalised '}top {m.moe_router_topk} of"
            f" {m.moe_router_score_function}, times {m.moe_router_topk_scaling_factor:g}"
            f"{', chosen with a bias' if m.moe_router_enable_expert_bias else ''}"
        )
    if ahead:
        layers = f"{m.draft_layers} layer" + "s" * (m.draft_layers > 1)
        out.append(
            f"besides: {folder.ahead}: {layers},"
            f" {sum(parameters[name] for name in ahead):,} parameters"
        )
    if folder.iteration is not None:
        out.append(f"step {folder.iteration:,}")
    out.append(f"tokenizer: {_tokenizer(folder)}")
    kinds = Counter(
        f"{re.sub(r'(?<=[.])[0-9]+(?=[.])', '*', name)} {list(shape)}"
        for name, shape in shapes.items()
    )
    for kind, times in kinds.items():
        out.append(f"  {kind}" + (f" x {times}" if "*" in kind else ""))
    return out


def _tokenizer(folder: CheckpointFolder) -> str:
    """The tokenizer: its files, or what the metadata of the run's data say."""
    m = folder.description
    files = ", ".join(path.name for path in folder.tokenizer_files())
    if not files and not m.tokenizer_model and m.tokenizer_type in (None, "NullTokenizer"):
        # Megatron's name for a run on data that are tokens already.
        try:
            made_with = data_tokenizer(folder)
        except CheckpointError as error:
            return f"that of the run's data, but {error}"
        if made_with is not None:
            kind = "bytes" if made_with.type == "byte" else made_with.type
            model = f" {made_with.model}" if made_with.model else ""
            return f"{kind}{model}, by the metadata of the run's data"
    named = f", --tokenizer-model: {m.tokenizer_model}" if m.tokenizer_model else ""
    return f"{m.tokenizer_type or 'not named'}, files: {files or 'none'}{named}"
