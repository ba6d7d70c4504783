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
    """Inside this context an operation that saves `tensor`, or a view of it, saves `rebuild`.

    Unlike a checkpoint, the context needs no random state and no hook on the output, so it works
    under CUDA graphs and in a core that recomputes itself. Use it for a tensor that is cheap to
    compute again.

    Args:
        rebuild: returns the contents of `tensor` in the same strides; called without gradients.
        group: packs all other tensors. Torch calls the innermost of nested hooks alone, so the
            group's own hooks would not run.
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
    """Size, strides and offset of a view of the rebuilt tensor."""
