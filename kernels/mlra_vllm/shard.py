"""Which latents, heads and MLP dims a tensor-parallel rank serves. Pure Python.

The sharding is that of the `latent` layout in training: a rank has whole latents or, with more
ranks than latents, a part of the heads that one latent serves.
"""

from __future__ import annotations

from dataclasses import dataclass

MLP_MULTIPLE = 16
"""A rank's part of an MLP is a multiple of this: GEMMs want rows of whole 32 bytes. The project's
engine has the same."""


@dataclass(frozen=True)
class Shard:
    """One rank's rectangle of (branch, head) pairs, and the latents that serve these pairs."""

    branches: int
    branch_start: int
    heads: int
    head_start: int
    groups: int
    """Head groups of these heads; each has one latent per branch."""
    group_start: int

    @property
    def latents(self) -> int:
        """Latent heads in the rank's cache."""
        return self.branches * self.groups


def plan(heads: int, latents: int, branches: int, tp: int, rank: int) -> Shard:
    """The shard of rank `rank` of `tp` ranks.

    Raises:
        ValueError: the model cannot be cut over `tp` ranks; lists the sizes that work.
    """
    if not _fits(heads, latents, branches, tp):
        works = [n for n in range(1, 129) if _fits(heads, latents, branches, n)]
        raise ValueError(
            f"tensor parallel size {tp} does not fit {heads} heads, {latents} latent heads and"
            f" {branches} branches; use one of {', '.join(map(str, works))}"
        )
    per_group = heads * branches // latents
    if branches % tp == 0:
        own_branches, branch_start = branches // tp, rank * (branches // tp)
        own_heads, head_start = heads, 0
    else:
        ranks_per_branch = tp // branches
        own_branches, branch_start = 1, rank // ranks_per_branch
        own_heads = heads // ranks_per_branch
        head_start = rank % ranks_per_branch * own_heads
    return Shard(
        branches=own_branches,
        branch_start=branch_start,
        heads=own_heads,
        head_start=head_start,
        groups=max(1, own_heads // per_group),
        group_start=head_start // per_group,
    )


def padded_mlp_size(size: int, tp: int) -> int:
    """The MLP size of `tp` ranks with equal parts of whole 32 bytes, `size` at least.

    Half of the 2.9 B MLRA-4's 9880 is 4940, whose bfloat16 rows begin at every 8 bytes, where the
    fast matrix kernels do not run.
    """
    unit = tp * MLP_MULTIPLE
    return -(-size // unit) * unit


def _fits(heads: int, latents: int, branches: int, tp: int) -> bool:
    return heads % tp == 0 and all(n % tp == 0 or tp % n == 0 for n in (latents, branches))
