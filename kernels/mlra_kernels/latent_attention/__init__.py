"""The absorbed core attention of training and prefill on Hopper: values are part of its keys."""

from mlra_kernels.latent_attention.ops import (
    LATENT_DIMS,
    ROPE_DIMS,
    check_supported,
    latent_attention,
    latent_attention_with_lse,
)

__all__ = [
    "LATENT_DIMS",
    "ROPE_DIMS",
    "check_supported",
    "latent_attention",
    "latent_attention_with_lse",
]
