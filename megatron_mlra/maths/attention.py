"""The maths of MLRA in plain torch, with which all other implementations are compared.

Letters: s tokens, b batch, d hidden size, h attention heads, n branches (N), g head groups
(G = L / N), l latent dim d_l, q `q_lora_rank`, `nope` d_h, `rope` d_r, v `v_head_dim`. Latent
`branch * G + group` serves heads `[group * h / G, (group + 1) * h / G)`. Results have the dtype of
the inputs; norms, RoPE and softmax are computed in float32 for half-precision inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_mlra.maths.norms import rms_norm, widen
from megatron_mlra.maths.rope import apply_rope, rope_cos_sin


def split_up_projection(weight: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """`[n, h, nope + v, l]` -> W_UK^T `[n, h, nope, l]` and W_UV^T `[n, h, v, l]`."""
    return weight[:, :, :nope], weight[:, :, nope:]


def rotate_absorb(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Absorbed queries of all (branch b, head i): `[q_i^nope W_UK_b,i^T | rotated q_i^rope]`.

    Args:
        q: `[s, b, h, nope + rope]`, not yet rotated; w_uk: `[n, h, nope, l]`;
            cos, sin: `[s, rope / 2]`.

    Returns:
        `[s, b, n * h, l + rope]`, branch-major: as in grouped-query attention, query head
        (branch, head) reads key (branch, group of the head) of `join_keys`.
    """
    n, _, nope, _ = w_uk.shape
    q_nope, q_rope = q.split((nope, q.size(-1) - nope), dim=-1)
    absorbed = torch.einsum("sbhd,nhdl->sbnhl", q_nope, w_uk)
    shared = apply_rope(q_rope, cos, sin).unsqueeze(2).expand(-1, -1, n, -1, -1)
    return torch.cat((absorbed, shared), dim=-1).flatten(2, 3)


def join_keys(latents: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Absorbed keys `[c_l | rotated k_rope]`; the values are the latents themselves.

    Args:
        latents: `[s, b, n, g, l]`; k_rope: `[s, b, rope]`, not yet rotated;
            cos, sin: `[s, rope / 2]`.

    Returns:
        `[s, b, n * g, l + rope]`.
    """
    s, b, n, g, _ = latents.shape
    shared = apply_rope(k_rope, cos, sin).view(s, b, 1, 1, -1).expand(-1, -1, n, g, -1)
    return torch.cat((latents, shared), dim=-1).flatten(2, 3)


def expand_latents(latents: Tensor, weight: Tensor) -> Tensor:
    """Keys and values of all pairs: `[s, b, n, g, l]`, `[n, h, e, l]` -> `[s, b, n, h, e]`."""
    n, h, e, l = weight.shape
    g = latents.size(3)
    out = torch.einsum("sbngl,ngjel->sbngje", latents, weight.view(n, g, h // g, e, l))
    return out.flatten(3, 4)


def sum_branches(z: Tensor, w_uv: Tensor, scale: float) -> Tensor:
    """scale sum_b z_b,i W_UV_b,i: `[s, b, n, h, l]`, `[n, h, v, l]` -> `[s, b, h, v]`.

    The contraction includes the sum over branches, which therefore needs no separate pass.
    """
    return torch.einsum("sbnhl,nhvl->sbhv", z, w_uv) * scale


def attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool = True) -> Tensor:
    """softmax(softmax_scale q k^T) v with grouped queries: the attention reference.

    Args:
        q: `[s, b, heads, d_k]`; query head i reads key head `i // (heads / kv_heads)`.
        k, v: `[t, b, kv_heads, d_k]`, `[t, b, kv_heads, d_v]`.
        softmax_scale: never derived from d_k, which in absorbed form is not d_h + d_r.
        causal: query i sees the keys up to number i + t - s.

    Returns:
        `[s, b, heads, d_v]`.
    """
    groups = q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = widen(torch.einsum("sbhd,tbhd->bhst", q, k)) * softmax_scale
    if causal:
        s, t = scores.shape[-2:]
        future = torch.ones(s, t, dtype=torch.bool, device=q.device).triu(1 + t - s)
        scores = scores.masked_fill(future, float("-inf"))
    return torch.einsum("bhst,tbhv->sbhv", scores.softmax(-1).to(v.dtype), v)


def materialized_qkv(
    q: Tensor,
    latents: Tensor,
    k_rope: Tensor,
    weight: Tensor,
    angles: tuple[Tensor, Tensor],
    key_angles: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all n * h (branch, head) pairs.

    Args:
        q: `[s, b, h, nope + rope]`, not yet rotated.
        latents: `[t, b, n, g, l]`.
        k_rope: `[t, b, rope]`, not yet rotated.
        weight: `[n, h, nope + v, l]`, the whole up-projection.
        angles, key_angles: (cos, sin) of queries `[s, rope / 2]` and of keys `[t, rope / 2]`.

    Returns:
        query `[s, b, n * h, nope + rope]`, key `[t, b, n * h, nope + rope]` and value
        `[t, b, n * h, v]`, branch-major.
    """
    n, h = weight.shape[:2]
    t, b = latents.shape[:2]
    nope = q.size(-1) - k_rope.size(-1)
    expanded = expand_latents(latents, weight)
    k_nope, value = expanded.split((nope, weight.size(2) - nope), dim=-1)
    shared = apply_rope(k_rope, *key_angles).view(t, b, 1, 1, -1).expand(-1, -1, n, h, -1)
    key = torch.cat((k_nope, shared), dim=-1).flatten(2, 3)
    q_nope, q_rope = q.split((nope, k_rope.size(-1)), dim=-1)
    query = torch.cat((q_nope, apply_rope(q_rope, *angles)), dim=-1)
    query = query.unsqueeze(2).expand(-1, -1, n, -1, -1).flatten(2, 3)
    return query, key, value.flatten(2, 3)


def mlra_attention(
    x: Tensor,
    weights: Mapping[str, Tensor],
    config,
    *,
    absorbed: bool,
    positions: Tensor | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The whole attention sublayer of one unsharded layer (method: Forward, steps 1 to 6).

    Args:
        x: `[s, b, d]`.
        weights: by parameter name, as MLRASelfAttention's at tensor parallel size 1:
            `linear_q_down_proj` `[q, d]` and `q_norm` `[q]` (or `linear_q_proj`
            `[h * (nope + rope), d]`),
            `linear_q_up_proj` `[h * (nope + rope), q]`, with `query_head_norm`
            `query_head_norm` `[h * (nope + rope)]`, `linear_kv_down_proj` `[L * l + rope, d]`,
            `kv_norm` `[L * l]`, `linear_kv_up_proj` `[n, h, nope + v, l]`,
            `linear_proj` `[d, h * v]`,
            gated: `linear_gate_proj` `[h * v, d]`.
        config: an MLRAConfig, or an object with the same sizes and scales.
        absorbed: attend to the latents themselves; else materialize keys and values.
        positions: `[s]`, default 0 .. s - 1.
        angles: cos and sin `[s, rope / 2]`, default plain RoPE of `positions`.

    Returns:
        `[s, b, d]`.
    """
    s, b, _ = x.shape
    n, g, h = config.num_branches, config.num_head_groups, config.num_attention_heads
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    eps = config.layernorm_epsilon
    if positions is None:
        positions = torch.arange(s, device=x.device)
    if angles is None:
        angles = rope_cos_sin(positions, rope, config.rotary_base, widen(x).dtype)
    cos, sin = angles

    if config.q_lora_rank is None:
        q = x @ weights["linear_q_proj"].T
    else:
        c_q = x @ weights["linear_q_down_proj"].T
        c_q = rms_norm(c_q, weights["q_norm"], eps, config.q_scale)
        q = c_q @ weights["linear_q_up_proj"].T
    q = q.view(s, b, h, nope + rope)
    if config.query_head_norm:
        q = rms_norm(q, weights["query_head_norm"].view(h, nope + rope), eps)

    c, k_rope = (x @ weights["linear_kv_down_proj"].T).split((config.kv_lora_rank, rope), dim=-1)
    latents = c.view(s, b, n, g, config.latent_dim)
    norm = weights["kv_norm"].view(n, g, config.latent_dim)
    latents = rms_norm(latents, norm, eps, config.kv_scale)

    up = weights["linear_kv_up_proj"]
    w_uk, w_uv = split_up_projection(up, nope)
    if absorbed:
        query, key = rotate_absorb(q, w_uk, cos, sin), join_keys(latents, k_rope, cos, sin)
        z = attend(query, key, latents.flatten(2, 3), config.softmax_scale)
        out = sum_branches(z.view(s, b, n, h, -1), w_uv, config.branch_scale)
    else:
        query, key, value = materialized_qkv(q, latents, k_rope, up, (cos, sin), (cos, sin))
        out = attend(query, key, value, config.softmax_scale).view(s, b, n, h, -1).sum(2)
        out = out * config.branch_scale
    out = out.flatten(2)
    if config.output_gate:
        out = out * torch.sigmoid(x @ weights["linear_gate_proj"].T)
    return out @ weights["linear_proj"].T
