"""Rebuilding a large tensor in backward instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_mlra.layers.offload import OffloadGroup


@contextmanager
def rebuilt_in_backward(
    tensor: Tensor, rebuild: Callable[[], Tensor], group: OffloadGroup | None = None
) -> Iterator[None]:
    """Inside, whatever operation keeps `tensor`, or a view of it, for backward keeps `rebuild`.

    Unlike a checkpoint it needs no random state and no hook on the output, so it works under CUDA
    graphs and in a core that recomputes itself; it is for a tensor that is cheap to make anew.

    Args:
        rebuild: returns the contents of `tensor` in the same strides; called without gradients.
        group: keeps all other tensors; of nested hooks torch calls the innermost alone.
    """
    storage = tensor.untyped_storage().data_ptr()

    def pack(kept: Tensor):
        if kept.device.type == "meta" or kept.untyped_storage().data_ptr() != storage:
            return kept if group is None else group.pack(kept)
        return _Place((kept.size(), kept.stride(), kept.storage_offset()))

    def unpack(packed) -> Tensor:
        if not isinstance(packed, _Place):
            return packed if group is None else group.unpack(packed)
        with torch.no_grad():
            return rebuild().as_strided(*packed)

    with saved_tensors_hooks(pack, unpack):
        yield


class _Place(tuple):
    """Size, strides and offset of a view of what is rebuilt."""
