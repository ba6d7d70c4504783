"""Cached numbers and bytes per token. Pure Python."""

from __future__ import annotations

from megatron_mlra.description.model import ModelDescription

DTYPE = "bfloat16"
"""In which bytes of a cache are counted, wherever none is allocated."""


def kv_cache_elements(shape: ModelDescription, tp: int = 1, layout: str = "latent") -> int:
    """Cached numbers per token and layer on one of `tp` tensor-parallel ranks (tp = 1: all).

    Latent layout max(L / tp, 1) d_l + d_r; head layout d_c + d_r on every rank; GQA max(g / tp, 1)
    2 c; GTA max(g / tp, 1) c + d_r; MFA 2 c (one key and one value head, replicated); TPA, which
    caches the key and value factors, 2 R_kv (max(h / tp, 1) + c).
    """
    if layout not in ("latent", "head"):
        raise ValueError(f"layout is {layout!r}; use latent or head")
    c, d_r = shape.head_dim, shape.qk_rope_head_dim

    def share(count: int) -> int:
        return -(-count // tp)

    if shape.attention == "mlra":
        latents = share(shape.num_latent_heads) if layout == "latent" else shape.num_latent_heads
        return latents * shape.latent_dim + d_r
    if shape.attention == "gqa":
        return share(shape.num_query_groups) * 2 * c
    if shape.attention == "gta":
        return share(shape.num_query_groups) * c + d_r
    if shape.attention == "mfa":
        return 2 * c
    return 2 * shape.tpa_kv_rank * (share(shape.num_attention_heads) + c)


def kv_cache_bytes_per_token(
    shape: ModelDescription, tp: int = 1, dtype_bytes: int = 2, layout: str = "latent"
) -> int:
    """Bytes a cached token takes on one rank, all layers: n * elements * dtype_bytes."""
    return shape.num_layers * kv_cache_elements(shape, tp, layout) * dtype_bytes


def kv_cache_text(shape: ModelDescription, tp: int = 1) -> str:
    """How a line names the cache of a model: in bfloat16, whatever it is trained in.

    A cache that is allocated (`mlra generate`, `mlra serve`) is named with its own dtype.
    """
    text = f"{kv_cache_bytes_per_token(shape):,} KV bytes per token in {DTYPE}"
    return text + (f" ({kv_cache_bytes_per_token(shape, tp):,} per TP rank)" if tp > 1 else "")
