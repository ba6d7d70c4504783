"""Training's absorbed core attention on Hopper, whose values are part of its keys."""

from mlra_kernels.latent_attention.ops import (
    LATENT_DIMS,
    ROPE_DIMS,
    check_supported,
    latent_attention,
)

__all__ = ["LATENT_DIMS", "ROPE_DIMS", "check_supported", "latent_attention"]
