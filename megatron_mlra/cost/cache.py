"""Sizes of the KV cache per token. Pure Python; letters of flops.py."""

from __future__ import annotations

from megatron_mlra.description.model import ModelDescription

DTYPE = "bfloat16"
"""The dtype for which cache bytes are stated if no cache is allocated."""


def kv_cache_elements(shape: ModelDescription, tp: int = 1) -> int:
    """Cached numbers per token and layer on each of `tp` tensor-parallel ranks.

    - MLRA, MLA, GLA: max(L / tp, 1) d_l + d_r;
    - GQA: max(g / tp, 1) 2 c; GTA: max(g / tp, 1) c + d_r;
    - MFA: 2 c, one key and one value head on every rank;
    - TPA: 2 R_kv (max(h / tp, 1) + c), the factors of keys and values.
    """
    c, d_r = shape.head_dim, shape.qk_rope_head_dim

    def share(count: int) -> int:
        return -(-count // tp)

    if shape.attention == "mlra":
        return share(shape.num_latent_heads) * shape.latent_dim + d_r
    if shape.attention == "gqa":
        return share(shape.num_query_groups) * 2 * c
    if shape.attention == "gta":
        return share(shape.num_query_groups) * c + d_r
    if shape.attention == "mfa":
        return 2 * c
    return 2 * shape.tpa_kv_rank * (share(shape.num_attention_heads) + c)


def kv_cache_bytes_per_token(shape: ModelDescription, tp: int = 1) -> int:
    """Cached bytes per token on one rank, in `DTYPE`, all layers: 2 n kv_cache_elements."""
    return 2 * shape.num_layers * kv_cache_elements(shape, tp)


def kv_cache_text(shape: ModelDescription, tp: int = 1) -> str:
    """Text on the cache of a model in bfloat16, whatever the dtype of its weights.

    `mlra generate` and `mlra serve`, which allocate a cache, name the dtype of that cache.
    """
    text = f"{kv_cache_bytes_per_token(shape):,} bytes of KV cache per token in {DTYPE}"
    return text + (f" ({kv_cache_bytes_per_token(shape, tp):,} per TP rank)" if tp > 1 else "")
