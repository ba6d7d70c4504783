"""Megatron's fine-grained activation offloading of an attention's parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
    FineGrainedActivationOffloadingInterface,
    PipelineOffloadManager,
)
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class OffloadGroup:
    """A part of the forward pass whose saved tensors Megatron copies to host memory.

    Megatron copies every saved tensor separately. Here tensors that share memory (a query and its
    parts, keys and the values in them) are copied once, as the whole memory that the tensors would
    keep, and come back with their strides; views of weights stay on the device. Nothing is freed by
    force: the copied memory is free once the forward pass has dropped its own references.

        with (group := OffloadGroup(wanted, x, "qkv_linear")) as x:
            y = f(x)
        y = group.commit(y)

    Args:
        wanted: False makes the group do nothing.
        tensor: the part's input; backward fetches an earlier part when the gradient of `tensor`
            is complete.
        name: Megatron's name of the part (`--offload-modules`).
        weights: parameters of which the part saves views.
    """

    def __init__(
        self, wanted: bool, tensor: Tensor, name: str, weights: Iterable[Tensor] = ()
    ) -> None:
        self._group = FineGrainedActivationOffloadingInterface(wanted, tensor, name)
        self._weights = {_address(weight) for weight in weights} if wanted else set()
        self._shared: dict[int, _Shared] = {}
        self._hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> Tensor:
        tensor = self._group.__enter__()
        self._group.tensor = None  # the group lives until backward, but need not hold the tensor
        if self._group.offload:
            chunk = PipelineOffloadManager.get_instance().cur_forward_chunk()
            if chunk is not None and chunk.do_offload:
                self._hooks = saved_tensors_hooks(self.pack, self.unpack)
                self._hooks.__enter__()
        return tensor

    def __exit__(self, *error: Any) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*error)
            self._hooks = None
        # Later tensors are not this group's, and may lie at addresses that are free again.
        self._shared = {}
        self._group.__exit__(*error)

    def commit(self, tensor: Tensor) -> Tensor:
        """End the part, whose result is `tensor`, and start its copies. In backward the part's
        tensors are back on the device when the gradient of the result arrives."""
        return self._group.group_offload(tensor, forced_released_tensors=[])

    def kept(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Keep `tensor`, without a gradient, as a saved tensor is kept; returns a function that
        returns `tensor` in backward, at every call."""
        tensor = tensor.detach()
        if self._hooks is None:
            return lambda: tensor
        packed, found = self.pack(tensor), []

        def fetch() -> Tensor:
            if not found:
                found.append(self.unpack(packed))
            return found[0]

        return fetch

    def pack(self, tensor: Tensor) -> Any:
        """What autograd keeps in place of `tensor`; outside of an active group, `tensor` itself."""
        if self._hooks is None or not _is_plain(tensor) or _address(tensor) in self._weights:
            return tensor
        whole = _whole(tensor)
        if whole is None:
            return PipelineOffloadManager.get_instance().on_save_for_backward(tensor)
        shared = self._shared.get(_address(tensor))
        if shared is None or shared.dtype != tensor.dtype:
            shared = self._shared[_address(tensor)] = _Shared(whole)
        shared.uses += 1
        return shared, tensor.size(), tensor.stride(), tensor.storage_offset()

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        """The tensor that `pack` was given, in backward."""
        if isinstance(packed, Tensor):
            return packed
        if isinstance(packed[0], _Shared):
            shared, *place = packed
            return shared.take().as_strided(*place)
        return PipelineOffloadManager.get_instance().on_get_saved_tensor(packed)


class _Shared:
    """Memory that saved tensors share: copied once, fetched once, kept until all are unpacked."""

    def __init__(self, whole: Tensor) -> None:
        self.dtype = whole.dtype
        self.uses = 0
        self._packed = PipelineOffloadManager.get_instance().on_save_for_backward(whole)
        self._whole: Tensor | None = None

    def take(self) -> Tensor:
        if self._whole is None:
            # Megatron returns a tensor once only.
            self._whole = PipelineOffloadManager.get_instance().on_get_saved_tensor(self._packed)
            self._packed = None
        whole = self._whole
        self.uses -= 1
        if not self.uses:
            self._whole = None
        return whole


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is a plain strided one that is not marked as staying on the device."""
    kept = getattr(tensor, "_TE_do_not_offload", False) or getattr(tensor, "_do_not_offload", False)
    return type(tensor) is Tensor and tensor.layout == torch.strided and not kept


def _whole(tensor: Tensor) -> Tensor | None:
    """The whole storage of `tensor`, in one dimension; None where the storage is more than twice
    the tensor, as of a few rows of a table."""
    numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
    if not 0 < numbers <= 2 * tensor.numel():
        return None
    return tensor.detach().as_strided((numbers,), (1,), 0)
