"""Sizes and scales derived from a latent attention's fields.

A mixin: each configuration class stores the fields, this computes the rest.
"""

from __future__ import annotations

import math


class LatentSizes:
    """Derived sizes and scales of a class with `hidden_size` d, `q_lora_rank` d_q, `kv_lora_rank`
    d_c, `num_latent_heads` L, `num_branches` N and `variance_scaling`."""

    @property
    def latent_dim(self) -> int:
        """d_l = d_c / L."""
        return self.kv_lora_rank // self.num_latent_heads

    @property
    def num_head_groups(self) -> int:
        """G = L / N: groups of heads that share their latents."""
        return self.num_latent_heads // self.num_branches

    @property
    def q_scale(self) -> float:
        """a_q = sqrt(d / d_q); 1 without variance scaling or without a query latent."""
        if not self.variance_scaling or self.q_lora_rank is None:
            return 1.0
        return math.sqrt(self.hidden_size / self.q_lora_rank)

    @property
    def kv_scale(self) -> float:
        """a_kv = sqrt(d / d_l); 1 without variance scaling."""
        return math.sqrt(self.hidden_size / self.latent_dim) if self.variance_scaling else 1.0

    @property
    def branch_scale(self) -> float:
        """N^-1/2; 1 without variance scaling."""
        return self.num_branches**-0.5 if self.variance_scaling else 1.0
