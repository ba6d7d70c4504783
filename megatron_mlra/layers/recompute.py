"""Rebuilding a large tensor in backward instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def rebuilt_in_backward(tensor: Tensor, rebuild: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, whatever operation keeps `tensor`, or a view of it, for backward keeps `rebuild`.

    Unlike a checkpoint it needs no random state and no hook on the output, so it works under CUDA
    graphs and in a core that recomputes itself; it is for a tensor that is cheap to make anew.

    Args:
        rebuild: returns the contents of `tensor` in the same strides; called without gradients.
    """
    storage = tensor.untyped_storage().data_ptr()

    def pack(kept: Tensor):
        if kept.device.type == "meta" or kept.untyped_storage().data_ptr() != storage:
            return kept
        return kept.size(), kept.stride(), kept.storage_offset()

    def unpack(packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return rebuild().as_strided(*packed)

    with saved_tensors_hooks(pack, unpack):
        yield
