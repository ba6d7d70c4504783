"""A rank's pieces of a weight, by the weight's entry in the sharded state dict."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor


def pieces(entry: ShardedTensor | ShardedTensorFactory, data: Tensor) -> list[ShardedTensor]:
    """The stored pieces of a parameter (or its gradient), holding `data`."""
    if isinstance(entry, ShardedTensorFactory):
        built = entry.build_fn(entry.key, data, entry.replica_id, None)
        return list(built.values()) if isinstance(built, dict) else list(built)
    view = entry.without_data()
    view.data = data
    return [view]


def like_built(entry: ShardedTensorFactory, data: Tensor, parts: list[Tensor]):
    built = entry.build_fn(entry.key, data, entry.replica_id, None)
    return dict(zip(built, parts, strict=True)) if isinstance(built, dict) else parts


def place(piece: ShardedTensor) -> tuple[Any, ...]:
    return slices(piece.global_offset, piece.local_shape, len(piece.global_shape))


def slices(offset, local_shape, dims: int) -> tuple[Any, ...]:
    """Index of a piece in the global tensor. Leading axes (layers) are not in the local shape."""
    prepended = dims - len(local_shape)
    index: list[Any] = list(offset[:prepended])
    index += [slice(o, o + n) for o, n in zip(offset[prepended:], local_shape, strict=True)]
    return tuple(index)
