"""Which tensor-parallel rank owns which heads and latents. Pure Python.

A rank's core attention works on a rectangle of (branch, head) pairs. Pairs in branch-major order
are also in the order of their latents, because latent `branch * G + group` serves consecutive
heads. There are two layouts:

- `head`: all N branches of h / tp consecutive heads.
- `latent`: N * h / tp consecutive pairs, which are whole latents, or a part of one if tp > L.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LatentShard:
    """One rank's rectangle of (branch, head) pairs, and the latents that serve these pairs."""

    tp_size: int
    tp_rank: int
    branches: int
    """Branches of the core on this rank (n)."""
    branch_start: int
    heads: int
    """Heads of the core on this rank (h)."""
    head_start: int
    groups: int
    """Head groups of these heads (g); the rank reads n * g latents."""
    group_start: int
    owns_latents: bool
    """Whether the rank's own down-projection makes the latents that the rank reads."""

    @classmethod
    def plan(
        cls, config: Any, tp_size: int, tp_rank: int, layout: str | None = None
    ) -> LatentShard:
        """The shard of `tp_rank`.

        Args:
            config: has `num_attention_heads`, `num_branches` and `num_latent_heads`, which fit
                `tp_size` (fit.py).
            layout: 'head' or 'latent'; None takes `config.latent_tp_layout`.
        """
        layout = layout or config.latent_tp_layout
        h, n = config.num_attention_heads, config.num_branches
        heads_per_group = h * n // config.num_latent_heads
        if layout == "head":
            branches, heads = n, h // tp_size
            branch_start, head_start = 0, tp_rank * heads
        elif n % tp_size == 0:
            branches, heads = n // tp_size, h
            branch_start, head_start = tp_rank * branches, 0
        else:
            ranks_per_branch = tp_size // n
            branches, heads = 1, h // ranks_per_branch
            branch_start = tp_rank // ranks_per_branch
            head_start = tp_rank % ranks_per_branch * heads
        return cls(
            tp_size=tp_size,
            tp_rank=tp_rank,
            branches=branches,
            branch_start=branch_start,
            heads=heads,
            head_start=head_start,
            groups=max(1, heads // heads_per_group),
            group_start=head_start // heads_per_group,
            owns_latents=tp_size == 1
            or (layout == "latent" and config.num_latent_heads % tp_size == 0),
        )
