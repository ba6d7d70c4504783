"""Ranks of the one-shot sum emulated in one process: their boxes, and words as a peer writes them.

The layout of a box is written anew here, from the kernel's docstring.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlra_kernels.one_shot import Peers


def boxes_of(world: int, rows: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Each rank's box, zero: int64 `[2, world, rows, words]`."""
    words = d if dtype.itemsize == 4 else (d + 1) // 2
    size = 2, world, rows, -(-words // 16) * 16
    return [torch.zeros(size, dtype=torch.int64) for _ in range(world)]


def peers_of(boxes: Sequence[Tensor], d: int, dtype: torch.dtype) -> list[Peers]:
    """Every rank's view of the boxes."""
    addresses = [box.data_ptr() for box in boxes]
    ranks = range(len(boxes))
    return [Peers(r, addresses, boxes[0].shape[2], d, dtype, "cpu", boxes) for r in ranks]


def words_of(x: Tensor, stamp: int) -> Tensor:
    """The words that carry `[T, d]`, one row after the other."""
    if x.dtype.itemsize == 4:
        data = x.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    else:
        bits = x.contiguous().view(torch.int16).long() & 0xFFFF
        half = (x.shape[1] + 1) // 2
        data = bits[:, :half].clone()
        data[:, : x.shape[1] - half] |= bits[:, half:] << 16
    return stamp << 32 | data


def deliver(boxes: Sequence[Tensor], to: int, summands: Sequence[Tensor], stamp: int) -> None:
    """Write what the other ranks send to rank `to`."""
    for sender, x in enumerate(summands):
        if sender != to:
            words = words_of(x, stamp)
            boxes[to][stamp & 1, sender, : len(x), : words.shape[1]] = words
