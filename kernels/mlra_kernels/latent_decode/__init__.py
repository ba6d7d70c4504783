"""Decoding over a paged cache of latent heads: attention, cache append, merging of results."""

from mlra_kernels.latent_decode.configs import DecodeConfig
from mlra_kernels.latent_decode.metadata import DecodeMetadata, decode_metadata
from mlra_kernels.latent_decode.ops import latent_cache_append, latent_decode, merge_states
from mlra_kernels.latent_decode.reference import rope_tables

__all__ = [
    "DecodeConfig",
    "DecodeMetadata",
    "decode_metadata",
    "latent_cache_append",
    "latent_decode",
    "merge_states",
    "rope_tables",
]
