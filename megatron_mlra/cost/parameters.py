"""Parameter counts from a model's dimensions alone. Pure Python. Letters as in flops.py."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mlra.description.model import ModelDescription


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. `attention` and `attention_norms` map the names of weights of one layer."""

    embedding: int
    """V d."""
    output_layer: int
    """V d, or 0 when tied to the embedding."""
    attention: dict[str, int]
    """Matrices of the attention of one layer."""
    attention_norms: dict[str, int]
    """Norm weights inside the attention of one layer."""
    layer_norms: int
    """2 d: the norms before attention and MLP of one layer."""
    mlp: int
    """3 d f (SwiGLU; else 2 d f): the MLP of one dense layer."""
    moe: int
    """d E + E 3 d f_e + 3 d f_shared: router, experts and shared expert of one MoE layer."""
    moe_active: int
    """The same with the k experts of one token in place of all E."""
    final_norm: int
    """d."""
    multi_token: int
    """All layers of multi-token prediction, each 2 d^2 + 3 d and a layer like the last one."""
    total: int
    active: int
    """Parameters that one token uses; `total` for a dense model."""


def parameters(shape: ModelDescription) -> Parameters:
    """Count every parameter of the model.

    total = V d (twice if untied) + d + n (attention + attention norms + 2 d) + dense layers * mlp
    + MoE layers * moe + multi-token prediction, whose layers are like the last one.
    """
    d, f, n = shape.hidden_size, shape.ffn_hidden_size, shape.num_layers
    matrices = 3 if shape.swiglu else 2
    weights, norms = _attention_weights(shape), _attention_norms(shape)
    embedding, mlp = shape.embedding_rows * d, matrices * d * f
    output = 0 if shape.tie_embeddings else embedding
    shared = d * shape.num_experts + matrices * d * shape.moe_shared_expert_intermediate_size
    expert = matrices * d * shape.moe_ffn_hidden_size
    moe, active = shared + shape.num_experts * expert, shared + shape.moe_router_topk * expert
    moe_layers = n - shape.num_dense_layers if shape.num_experts else 0
    per_layer = sum(weights.values()) + sum(norms.values()) + 2 * d
    last = shape.is_moe(-1)
    ahead = shape.draft_layers
    join = 2 * d * d + 3 * d + per_layer
    rest = embedding + output + d + n * per_layer + (n - moe_layers) * mlp
    return Parameters(
        embedding=embedding,
        output_layer=output,
        attention=weights,
        attention_norms=norms,
        layer_norms=2 * d,
        mlp=mlp,
        moe=moe,
        moe_active=active,
        final_norm=d,
        multi_token=ahead * (join + (moe if last else mlp)),
        total=rest + moe_layers * moe + ahead * (join + (moe if last else mlp)),
        active=rest + moe_layers * active + ahead * (join + (active if last else mlp)),
    )


def _attention_weights(shape: ModelDescription) -> dict[str, int]:
    d, h, c, g = (
        shape.hidden_size,
        shape.num_attention_heads,
        shape.head_dim,
        shape.num_query_groups,
    )
    if shape.attention == "mlra":
        d_q, d_c, d_r = shape.q_lora_rank, shape.kv_lora_rank, shape.qk_rope_head_dim
        d_h, d_v = shape.qk_nope_head_dim, shape.v_head_dim
        q_out = h * (d_h + d_r)
        weights = {"linear_q_proj": d * q_out}
        if d_q is not None:
            weights = {"linear_q_down_proj": d * d_q, "linear_q_up_proj": d_q * q_out}
        weights["linear_kv_down_proj"] = d * (d_c + d_r)
        # L blocks of [d_l, (h / G) (d_h + d_v)] are N h heads of [d_l, d_h + d_v].
        weights["linear_kv_up_proj"] = shape.latent_dim * shape.num_branches * h * (d_h + d_v)
        if shape.output_gate:
            weights["linear_gate_proj"] = d * h * d_v
        return weights | {"linear_proj": h * d_v * d}
    if shape.attention == "gqa":
        gate = h if shape.output_gate else 0
        weights = {"linear_qkv": d * c * (h + gate + 2 * g)}
    elif shape.attention == "gta":
        weights = {
            "linear_q_proj": d * h * c,
            "linear_kv_proj": d * g * c,
            "linear_k_rope_proj": d * shape.qk_rope_head_dim,
        }
    elif shape.attention == "mfa":
        weights = {
            "linear_q_down_proj": d * shape.q_lora_rank,
            "linear_q_up_proj": shape.q_lora_rank * h * c,
            "linear_kv_proj": d * 2 * c,
        }
    else:
        ranks = {"q": shape.tpa_q_rank, "k": shape.tpa_kv_rank, "v": shape.tpa_kv_rank}
        weights = {f"linear_{x}_head_factors": d * h * r for x, r in ranks.items()}
        weights |= {f"linear_{x}_dim_factors": d * r * c for x, r in ranks.items()}
    return weights | {"linear_proj": h * c * d}


def _attention_norms(shape: ModelDescription) -> dict[str, int]:
    norms = {}
    if shape.attention in ("mlra", "mfa") and shape.q_lora_rank is not None:
        norms["q_norm"] = shape.q_lora_rank
    if shape.attention == "mlra":
        norms["kv_norm"] = shape.kv_lora_rank  # L weights of d_l
    if shape.query_head_norm:
        q_dim = shape.qk_nope_head_dim + shape.qk_rope_head_dim
        norms["query_head_norm"] = shape.num_attention_heads * q_dim
    if shape.attention == "gqa" and shape.qk_layernorm:
        norms["qk_layernorm"] = 2 * shape.head_dim
    return norms
