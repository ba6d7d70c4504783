"""RoPE tables of a model: plain, or YaRN (arXiv 2309.00071). Pairs are (i, i + r / 2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlra_vllm.config import MLRAConfig


def rotary_tables(config: MLRAConfig, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin `[positions, r / 2]` float32, times YaRN's factor.

    Angles are computed in float64: at positions of half a million float32 angles are inexact.
    """
    rope, dim = config.rope_parameters, config.qk_rope_head_dim
    exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    frequencies, factor = rope["rope_theta"] ** -exponent, 1.0
    if rope["rope_type"] == "yarn":
        frequencies, factor = _yarn_frequencies(rope, frequencies, dim), rope["attention_factor"]
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def _yarn_frequencies(rope: dict, frequencies: Tensor, dim: int) -> Tensor:
    """YaRN's frequencies: fast pairs keep theirs, those of slow pairs are divided by the factor,
    those between are interpolated."""

    def pair(rotations: float) -> float:
        """The (fractional) pair that turns `rotations` times within the original context."""
        turns = rope["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope["rope_theta"]))

    low = max(math.floor(pair(rope["beta_fast"])), 0)
    high = min(math.ceil(pair(rope["beta_slow"])), dim - 1)
    steps = torch.arange(dim // 2, dtype=torch.float64) - low
    ramp = (steps / max(high - low, 0.001)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / rope["factor"] * ramp


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x `[T, H, r]` by cos and sin `[T, r / 2]` of its tokens; float32 inside."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
