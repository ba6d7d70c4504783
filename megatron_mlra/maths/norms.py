"""RMSNorm in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """x in float32, or untouched where it is wider already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float, scale: float = 1.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * scale over the last dim; `weight` broadcasts to x."""
    wide = widen(x)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * (widen(weight) * scale)).to(x.dtype)
