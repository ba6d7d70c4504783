"""Measurements of one attention layer, summed over windows of text.

Letters: s tokens of a window, d hidden size, h heads, n branches, g head groups, L = n g latent
heads, l latent dim, r RoPE dim, d_h and d_v the other head dims. All sums are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_mlra.hf.attention_mlra import MLRAAttention

SCORES_AT_ONCE = 2**24
"""Most attention scores held at a time: 64 MiB of float32, and a few copies of them."""


def effective_rank(variances: Tensor) -> float:
    """exp(entropy of the shares of variance): r if r directions have equal variance and the others
    none; 0 without any variance.

    Args:
        variances: eigenvalues of a covariance, or squared singular values.
    """
    variances = variances.double().clamp(min=0)
    if not float(variances.sum()):
        return 0.0
    return math.exp(float(torch.special.entr(variances / variances.sum()).sum()))


def rank(variances: Tensor) -> int:
    """Number of directions with more than 1e-6 of the largest variance (1e-3 in amplitude)."""
    variances = variances.double()
    return int((variances > 1e-6 * variances.max()).sum()) if float(variances.max()) > 0 else 0


@dataclass
class Moments:
    """Sums of vectors over tokens, for their mean and variances, or their covariance."""

    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Add vectors `[s, ..., e]` for `variances`."""
        x = x.double()
        self.count += len(x)
        self.total = self.total + x.sum(0)
        self.squares = self.squares + x.square().sum(0)

    def add_products(self, x: Tensor) -> None:
        """Add vectors `[s, k, e]` for `eigenvalues`, with covariances `[k, e, e]`."""
        x = x.double()
        self.count += len(x)
        self.total = self.total + x.sum(0)
        self.squares = self.squares + torch.einsum("ske,skf->kef", x, x)

    def variances(self) -> Tensor:
        """Variance of each component over tokens, `[..., e]` float64."""
        mean = self.total / self.count
        return (self.squares / self.count - mean.square()).clamp(min=0)

    def eigenvalues(self) -> Tensor:
        """Eigenvalues `[k, e]` float64 of the covariances."""
        mean = self.total / self.count
        covariance = self.squares / self.count - mean[:, :, None] * mean[:, None, :]
        return torch.linalg.eigvalsh(covariance).clamp(min=0)


@dataclass
class LayerSums:
    """The sums of one layer over windows, and its measurements."""

    attention: MLRAAttention
    rope_keys: Moments = field(default_factory=Moments)
    nope_keys: Moments = field(default_factory=Moments)
    latents: Moments = field(default_factory=Moments)
    entropy: Tensor | float = 0.0
    """`[n, h]`, entropies of attention rows, summed over queries."""
    most_entropy: float = 0.0
    """The same sum for rows of equal weights, the largest possible."""
    divergence: Tensor | float = 0.0
    """`[n, n]`, Jensen-Shannon divergence of branches, summed over queries and heads."""
    cosine: Tensor | float = 0.0
    """`[n, n]`, cosine of the branches' outputs, summed over tokens and heads."""

    @torch.inference_mode()
    def add(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> None:
        """Add a window.

        Args:
            x: the layer's input after its norm, `[1, s, d]`.
            cos_sin: RoPE tables of the positions.
        """
        module = self.attention
        config = module.config
        q_nope, q_rope, rows = module.compress(x, cos_sin)
        latents, k_rope = module.split_rows(rows)  # [1, s, n, g, l], [1, s, r]
        k_nope, value = module.kv_b_proj(latents, "expand").split(module.kv_b_proj.sizes, dim=-1)
        # The variance is measured before RoPE, which rotates keys and keeps their length.
        self.rope_keys.add(module.kv_a_proj_with_mqa(x)[0, :, config.kv_lora_rank :])
        self.nope_keys.add(k_nope[0])
        self.latents.add_products(latents[0].flatten(1, 2))
        length, n, h = k_nope.size(1), k_nope.size(2), k_nope.size(3)
        self.most_entropy += float(torch.arange(1, length + 1).double().log().sum())
        step = max(1, SCORES_AT_ONCE // (n * h * length))
        for first in range(0, length, step):
            last = min(first + step, length)
            scores = torch.einsum("qhe,tnhe->nhqt", q_nope[0, first:last], k_nope[0, :last])
            scores = scores + torch.einsum("qhr,tr->hqt", q_rope[0, first:last], k_rope[0, :last])
            at = torch.arange(last, device=x.device)
            hidden = at[None, :] > at[first:last, None]
            scores = (scores.float() * config.softmax_scale).masked_fill(hidden, -math.inf)
            self._add_rows(scores.softmax(-1), value[0, :last].float())

    def _add_rows(self, weights: Tensor, value: Tensor) -> None:
        """Add attention rows `[n, h, q, t]` of some queries, with values `[t, n, h, d_v]`."""
        branches = len(weights)
        entropies = torch.special.entr(weights).sum(-1)  # [n, h, q]
        self.entropy = self.entropy + entropies.double().sum(-1)
        out = torch.einsum("nhqt,tnhv->nhqv", weights, value)
        out = torch.nn.functional.normalize(out.double(), dim=-1)
        self.cosine = self.cosine + torch.einsum("ihqv,jhqv->ij", out, out)
        divergence = torch.zeros(branches, branches, dtype=torch.float64, device=weights.device)
        for i in range(branches):
            for j in range(i):
                mixed = torch.special.entr((weights[i] + weights[j]) / 2).sum(-1)
                found = (mixed - (entropies[i] + entropies[j]) / 2).double().sum()
                divergence[i, j] = divergence[j, i] = found
        self.divergence = self.divergence + divergence

    def result(self) -> dict[str, Any]:
        """The layer's measurements as plain numbers; `rope_key_variance` is None without RoPE."""
        config, tokens = self.attention.config, self.latents.count
        heads = config.num_attention_heads
        # The method's a_kv^2, which a model without variance scaling does not apply.
        calibration = config.hidden_size / config.latent_dim
        nope = self.nope_keys.variances().mean((1, 2))  # [n]
        without = nope / config.kv_scale**2
        eigenvalues = self.latents.eigenvalues()
        keys, values = self._up_projections()
        rope = self.rope_keys.variances()
        return {
            "rope_key_variance": float(rope.mean()) if len(rope) else None,
            "nope_key_variance": (without * calibration).tolist(),
            "nope_key_variance_without_calibration": without.tolist(),
            "entropy": (self.entropy / tokens).mean(-1).tolist(),
            "entropy_by_head": (self.entropy / tokens).tolist(),
            "entropy_of_equal_weights": self.most_entropy / tokens,
            "divergence": (self.divergence / (tokens * heads)).tolist(),
            "cosine": (self.cosine / (tokens * heads)).tolist(),
            "latent_effective_rank": [effective_rank(each) for each in eigenvalues],
            "latent_rank": [rank(each) for each in eigenvalues],
            "key_up_projection_effective_rank": [effective_rank(each) for each in keys],
            "value_up_projection_effective_rank": [effective_rank(each) for each in values],
        }

    def _up_projections(self) -> tuple[list[Tensor], list[Tensor]]:
        """Squared singular values of W_UK and of W_UV of each latent head."""
        module = self.attention.kv_b_proj
        groups = self.attention.config.num_head_groups
        weight = module.weight.detach().double().unflatten(1, (groups, -1))
        found = []
        for part in weight.split(module.sizes, dim=3):  # [n, g, h / g, d, l]
            matrices = part.flatten(2, 3).flatten(0, 1)
            found.append([torch.linalg.svdvals(each).square() for each in matrices])
        return found[0], found[1]
