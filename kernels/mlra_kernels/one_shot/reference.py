"""Plain torch reference of the fused sum over ranks: float32 inside, any device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def all_reduce_add_rms_norm_reference(
    summands: Sequence[Tensor], residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(sum, norm), both `[T, d]`, for all ranks' summands `[T, d]` in the order of ranks; other
    arguments as in `ops.all_reduce_add_rms_norm`, rounded where the operator rounds."""
    total = torch.zeros_like(summands[0], dtype=torch.float32)
    for summand in summands:
        total = total + summand.float()
    dtype = residual.dtype
    total = (total.to(dtype).float() + residual.float()).to(dtype)
    wide = total.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return total, (wide * inverse * weight.float()).to(dtype)
