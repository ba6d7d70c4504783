"""RoPE tables of a model: plain, or YaRN (arXiv 2309.00071) as Megatron computes it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_mlra.description.model import ModelDescription


def rotary_tables(
    model: ModelDescription, positions: int, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """cos and sin `[positions, dim / 2]` float32, times YaRN's concentration factor.

    Angles are computed in float64: positions of half a million leave float32 no digits to spare.
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


def _magnitude(model: ModelDescription, mscale: float) -> float:
    factor = model.rotary_scaling_factor
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_frequencies(model: ModelDescription, frequencies: Tensor, dim: int) -> Tensor:
    """Fast pairs keep their frequency, slow ones are stretched, those between are mixed."""

    def pair(rotations: float) -> float:
        """The (fractional) pair that turns `rotations` times over the original context."""
        turns = model.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(model.rotary_base))

    low = max(math.floor(pair(model.beta_fast)), 0)
    high = min(math.ceil(pair(model.beta_slow)), dim - 1)
    width = max(high - low, 0.001)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / model.rotary_scaling_factor * ramp
