"""Exported models sharded over two processes, in each of the ways that trainers shard them."""

from __future__ import annotations

import pytest
import torch

from support.drivers.fsdp import HOW, MODELS, RANKS


@pytest.fixture(scope="module")
def found(run_driver):
    """Results of each rank."""
    folder = run_driver("fsdp", 900)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_the_whole_model(found, name, how):
    for rank in range(RANKS):
        whole, sharded = found[rank][name, "whole"], found[rank][name, how]
        for key in ("logits", "inference"):
            torch.testing.assert_close(sharded[key], whole[key], rtol=1e-5, atol=1e-5)
        assert sharded["gradients"].keys() == whole["gradients"].keys()
        for weight, gradient in whole["gradients"].items():
            scale = gradient.abs().max()
            assert (sharded["gradients"][weight] - gradient).abs().max() <= 1e-5 * scale, weight


def test_the_ranks_choose_different_experts(found):
    """Else a rank that gathers only what it uses would not be found out."""
    one, other = (found[rank]["MLRA-4 experts", "whole"]["chosen"] for rank in range(RANKS))
    assert one != other
