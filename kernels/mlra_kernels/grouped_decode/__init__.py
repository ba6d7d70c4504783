"""Grouped-query decoding over a paged key/value cache, for comparison with latent attention."""

from mlra_kernels.grouped_decode.ops import grouped_decode

__all__ = ["grouped_decode"]
