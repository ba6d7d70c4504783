"""Canonical names and shapes of a model's weights: Megatron's names, one per layer and expert.

Shapes are global (without tensor parallelism), and without padding of the vocabulary.
"""

from __future__ import annotations

from megatron_mlra.description.model import ModelDescription

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
VOCABULARY = (EMBEDDING, OUTPUT)
"""Tensors whose rows are the vocabulary."""
EXPERTS = "mlp.experts.experts."
"""Prefix of the names of a layer's routed experts, before the expert's number."""
EXPERT_BIAS = "mlp.router.expert_bias"
"""A tensor that is float32 for every dtype of the weights, as in Megatron."""


MULTI_TOKEN_LAYER = "transformer_layer."
"""Prefix of the transformer layer's names within a layer of multi-token prediction."""


def multi_token_prefix(depth: int) -> str:
    """Prefix of the names of a layer of multi-token prediction."""
    return f"mtp.layers.{depth}."


def layer_prefix(layer: int) -> str:
    """Prefix of the names of a layer's tensors."""
    return f"decoder.layers.{layer}."


def dtype_of(name: str, dtype: str) -> str:
    """The dtype of a canonical tensor in a model with weights of `dtype`."""
    return "float32" if name.endswith(EXPERT_BIAS) else dtype


def layer_tensors(description: ModelDescription, layer: int) -> dict[str, tuple[int, ...]]:
    """Name without the layer's prefix -> shape. The order of rows:

    - `self_attention.linear_kv_down_proj.weight` `[d_c + d_r, d]`: latents, then the RoPE key
    - `self_attention.linear_kv_up_proj.weight` `[N, h, d_h + d_v, d_l]`: keys, then values
    - `self_attention.linear_qkv.weight` ('gqa'): per query group its query heads, its gate heads
      (if gated), one key and one value head
    - `mlp.linear_fc1.weight` `[2 ffn, d]`: gate rows, then up rows; in a layer with experts
      `mlp.experts.experts.{e}.linear_fc1.weight` and `mlp.shared_experts.linear_fc1.weight`
    - `mlp.router.weight` `[E, d]`
    """
    m = description
    d = m.hidden_size
    return {
        "input_layernorm.weight": (d,),
        **{f"self_attention.{name}.weight": shape for name, shape in _attention(m).items()},
        "pre_mlp_layernorm.weight": (d,),
        **(_experts(m) if m.is_moe(layer) else _mlp("mlp.", d, m.ffn_hidden_size)),
    }


def _mlp(prefix: str, d: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}linear_fc1.weight": (2 * ffn, d), f"{prefix}linear_fc2.weight": (d, ffn)}


def _experts(m: ModelDescription) -> dict[str, tuple[int, ...]]:
    d, shared = m.hidden_size, m.moe_shared_expert_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"mlp.router.weight": (m.num_experts, d)}
    if m.moe_router_enable_expert_bias:
        shapes[EXPERT_BIAS] = (m.num_experts,)
    for e in range(m.num_experts):
        shapes |= _mlp(f"{EXPERTS}{e}.", d, m.moe_ffn_hidden_size)
    return shapes | (_mlp("mlp.shared_experts.", d, shared) if shared else {})


def _attention(m: ModelDescription) -> dict[str, tuple[int, ...]]:
    d, h = m.hidden_size, m.num_attention_heads
    if m.attention == "gqa":
        heads = h * (2 if m.output_gate else 1) + 2 * m.num_query_groups
        return {"linear_qkv": (heads * m.head_dim, d), "linear_proj": (d, h * m.head_dim)}
    q_size = h * (m.qk_nope_head_dim + m.qk_rope_head_dim)
    if m.q_lora_rank is None:
        shapes: dict[str, tuple[int, ...]] = {"linear_q_proj": (q_size, d)}
    else:
        shapes = {
            "linear_q_down_proj": (m.q_lora_rank, d),
            "q_norm": (m.q_lora_rank,),
            "linear_q_up_proj": (q_size, m.q_lora_rank),
        }
    if m.query_head_norm:
        shapes["query_head_norm"] = (q_size,)
    shapes |= {
        "linear_kv_down_proj": (m.kv_lora_rank + m.qk_rope_head_dim, d),
        "kv_norm": (m.kv_lora_rank,),
        "linear_kv_up_proj": (
            m.num_branches,
            h,
            m.qk_nope_head_dim + m.v_head_dim,
            m.latent_dim,
        ),
    }
    if m.output_gate:
        shapes["linear_gate_proj"] = (h * m.v_head_dim, d)
    return shapes | {"linear_proj": (d, h * m.v_head_dim)}


def expected_tensors(description: ModelDescription) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of the model, in the order of a forward pass.

    The tensors of multi-token prediction are last.
    """
    m = description
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (m.vocab_size, m.hidden_size)}
    for layer in range(m.num_layers):
        shapes = layer_tensors(m, layer)
        tensors |= {layer_prefix(layer) + name: shape for name, shape in shapes.items()}
    tensors[FINAL_NORM] = (m.hidden_size,)
    if not m.tie_embeddings:
        tensors[OUTPUT] = (m.vocab_size, m.hidden_size)
    return tensors | multi_token_tensors(m, m.draft_layers)


def multi_token_tensors(description: ModelDescription, depths: int) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of `depths` layers of multi-token prediction. Each
    contains a layer like the model's last one."""
    d = description.hidden_size
    own = {"enorm": (d,), "hnorm": (d,), "eh_proj": (d, 2 * d), "final_layernorm": (d,)}
    last = layer_tensors(description, description.num_layers - 1)
    tensors: dict[str, tuple[int, ...]] = {}
    for prefix in map(multi_token_prefix, range(depths)):
        tensors |= {f"{prefix}{name}.weight": shape for name, shape in own.items()}
        tensors |= {prefix + MULTI_TOKEN_LAYER + name: shape for name, shape in last.items()}
    return tensors
