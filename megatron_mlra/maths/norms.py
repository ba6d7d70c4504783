"""RMSNorm in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """x in float32, or x itself if its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float, scale: float = 1.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * scale over the last dim, in float32, then in x's dtype.

    Args:
        x: `[..., d]`.
        weight: `[..., d]`, broadcast to x.
    """
    wide = widen(x)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * (widen(weight) * scale)).to(x.dtype)
