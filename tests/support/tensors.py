"""Compares the weights of checkpoint folders."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from megatron_mlra.checkpoint.formats import open_checkpoint


def assert_same_tensors(a, b) -> None:
    a, b = open_checkpoint(a), open_checkpoint(b)
    assert a.names() == b.names()
    for name, tensor in a.tensors():
        other = b.tensor(name)
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name


def weights_of(folder) -> dict[str, torch.Tensor]:
    """Name -> tensor, of all `.bin` and `.safetensors` files of a folder."""
    weights = {}
    for file in sorted(folder.glob("*.bin")):
        weights |= torch.load(file, weights_only=True)
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def norms_drawn(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights, norms around one in place of ones, which any part of a norm would fit."""
    draw = torch.Generator().manual_seed(5)
    return {
        name: 1 + 0.2 * torch.randn(weight.shape, generator=draw) if "norm" in name else weight
        for name, weight in weights.items()
    }
