"""Decoding over a paged key/value cache of grouped-query attention, to compare latents with."""

from mlra_kernels.grouped_decode.ops import grouped_decode

__all__ = ["grouped_decode"]
