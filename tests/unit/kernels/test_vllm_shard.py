"""The vLLM plugin's cut over ranks is that of training's latent layout."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from megatron_mlra.sharding.partition import LatentShard
from mlra_vllm.shard import plan

SHAPES = [
    (heads, latents, branches)
    for heads in (8, 24, 64)
    for latents in (1, 2, 4, 8)
    for branches in (1, 2, 4, 8)
    if latents % branches == 0 and heads % (latents // branches) == 0
]


def fits(size: int, heads: int, latents: int, branches: int) -> bool:
    """Whether each count divides the size or is divided by it."""
    return heads % size == 0 and all(n % size == 0 or size % n == 0 for n in (latents, branches))


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_rank_has_the_share_of_training(tp):
    seen = 0
    for heads, latents, branches in SHAPES:
        if not fits(tp, heads, latents, branches):
            continue
        config = SimpleNamespace(
            num_attention_heads=heads, num_branches=branches, num_latent_heads=latents
        )
        for rank in range(tp):
            ours = plan(heads, latents, branches, tp, rank)
            theirs = asdict(LatentShard.plan(config, tp, rank, "latent"))
            assert asdict(ours).items() <= theirs.items()
            assert ours.latents == max(latents // tp, 1)
            seen += 1
    assert seen >= 30 * tp // 2


@pytest.mark.parametrize("tp", [3, 5, 7, 16])
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(tp):
    with pytest.raises(
        ValueError,
        match=rf"tensor parallel size {tp} does not fit 8 heads, .* use one of 1, 2, 4, 8",
    ):
        plan(8, 4, 4, tp, 0)
