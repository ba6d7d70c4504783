"""A simulation: what a cache with its RoPE key in FP8 too would cost a model. Nothing serves one.

The served FP8 cache keeps the RoPE key in bfloat16. Here every key is rounded to e4m3 with one
scale per token (its largest number / 448) right after it is written, and stored in bfloat16 as
before. So all attention reads the numbers of such a cache, and no byte is saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mlra.inference.backends.base import Ops
from mlra_kernels.latent_decode.reference import FP8_DTYPE, FP8_MAX, split_cache

FP8_ROPE = "fp8-rope"
"""The simulated cache's name in `mlra evaluate --cache-dtype`."""


def rounded(keys: Tensor) -> Tensor:
    """Keys `[T, R]` as they come back from e4m3 with a scale for each token; same dtype."""
    wide = keys.float()
    scale = wide.abs().amax(-1, keepdim=True) / FP8_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    return ((wide / scale).to(FP8_DTYPE).float() * scale).to(keys.dtype)


class RoundedRopeOps:
    """A backend's operations, whose `append` rounds the RoPE keys it wrote. No CUDA graphs."""

    def __init__(self, ops: Ops, rope_dim: int) -> None:
        self._ops, self._rope_dim = ops, rope_dim

    def __getattr__(self, name: str):
        return getattr(self._ops, name)

    def append(self, kv: Tensor, norm: Tensor, tables, step, layer, scale: float, eps: float):
        """Write new tokens, then round their RoPE keys; slots as `latent_cache_append` takes."""
        self._ops.append(kv, norm, tables, step, layer, scale, eps)
        keys = split_cache(layer[0], self._rope_dim)[1]
        slots = step.slots.long()
        slots = slots[(slots >= 0) & (slots < keys.shape[0] * keys.shape[1])]
        at = slots // keys.shape[1], slots % keys.shape[1]
        keys[at] = rounded(keys[at])
