"""The absorbed core attention of training and prefill on Hopper: values are part of the keys."""

from mlra_kernels.latent_attention.ops import (
    check_supported,
    latent_attention,
    latent_attention_with_lse,
    latent_attention_with_top,
    misfit,
)
from mlra_kernels.latent_attention.spans import key_ranges, query_tiles, reads_of

__all__ = [
    "check_supported",
    "key_ranges",
    "latent_attention",
    "latent_attention_with_lse",
    "latent_attention_with_top",
    "misfit",
    "query_tiles",
    "reads_of",
]
