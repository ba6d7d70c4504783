"""RoPE tables of a model: plain, or YaRN (arXiv 2309.00071) as Megatron computes it."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from megatron_mlra.maths.norms import widen


class Rotary(Protocol):
    """The fields of a ModelDescription that determine its RoPE tables."""

    attention: str
    head_dim: int
    qk_rope_head_dim: int
    rotary_base: float
    rope_type: str
    rotary_scaling_factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


def rotary_tables(
    model: Rotary, positions: int, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """cos and sin `[positions, dim / 2]` float32, times YaRN's concentration factor.

    Angles are computed in float64: at positions of half a million float32 angles are inexact.
    """
    dim = model.head_dim if model.attention == "gqa" else model.qk_rope_head_dim
    frequencies = model.rotary_base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    concentration = 1.0
    if model.rope_type == "yarn":
        frequencies = _yarn_frequencies(model, frequencies, dim)
        concentration = _magnitude(model, model.mscale) / _magnitude(model, model.mscale_all_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    return (
        (angles.cos() * concentration).float().to(device),
        (angles.sin() * concentration).float().to(device),
    )


def _magnitude(model: Rotary, mscale: float) -> float:
    factor = model.rotary_scaling_factor
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_frequencies(model: Rotary, frequencies: Tensor, dim: int) -> Tensor:
    """YaRN's frequencies: fast pairs keep theirs, those of slow pairs are divided by the scaling
    factor, those between are interpolated."""

    def pair(rotations: float) -> float:
        """The (fractional) pair that turns `rotations` times within the original context."""
        turns = model.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(model.rotary_base))

    low = max(math.floor(pair(model.beta_fast)), 0)
    high = min(math.ceil(pair(model.beta_slow)), dim - 1)
    width = max(high - low, 0.001)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / model.rotary_scaling_factor * ramp


def rope_cos_sin(
    positions: Tensor, dim: int, base: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin `[s, dim / 2]` of `positions[s] * base^(-2 i / dim)`, computed in `dtype`."""
    exponent = torch.arange(0, dim, 2, dtype=dtype, device=positions.device) / dim
    angle = positions.to(dtype)[:, None] * base**-exponent
    return angle.cos(), angle.sin()


def unrotated(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables like these that leave their dims as they are, bit by bit: of a layer without RoPE."""
    return torch.ones_like(cos), torch.zeros_like(sin)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d_r / 2) of the last dim: half-split RoPE.

    Args:
        x: `[s, ..., d_r]`.
        cos, sin: `[s, d_r / 2]`.
    """
    shape = (cos.size(0), *(1,) * (x.dim() - 2), cos.size(1))
    cos, sin = cos.view(shape), sin.view(shape)
    first, second = widen(x).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
