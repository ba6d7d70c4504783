"""What `mlra inspect` says of a model."""

from __future__ import annotations

import pytest

from megatron_mlra.checkpoint.verify.summary import lines
from support.random_checkpoint import RandomFolder, latent


@pytest.mark.parametrize(("dims", "said"), [(8, "RoPE base 10000"), (0, "no RoPE (NoPE)")])
def test_a_model_without_rope_has_no_base_of_it(dims, said):
    sizes = lines(RandomFolder(latent(4, 4, qk_rope_head_dim=dims)))[1]
    assert f" 64 positions, {said}, eps " in sizes


@pytest.mark.parametrize("normed", [False, True])
def test_a_norm_of_query_heads_is_named(normed):
    said = lines(RandomFolder(latent(4, 4, query_head_norm=normed)))
    assert said[2].endswith(", norm of query heads") == normed
    assert any("query_head_norm.weight [192] x 2" in line for line in said) == normed


def test_layers_without_rope_are_counted():
    sizes = lines(RandomFolder(latent(4, 4, no_rope_pattern=(0, 1))))[1]
    assert ", RoPE base 10000 (none in 1 of 2 layers), eps " in sizes
