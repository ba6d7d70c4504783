"""Memory and barriers of the kernel emulator (emulated.py)."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable

from torch import Tensor


class Pointer:
    """Pointers to elements of a tensor, as offsets from its first element."""

    def __init__(self, data: Tensor, at=0) -> None:
        assert data.is_contiguous()
        self.data, self.at = data, at

    def __add__(self, offset) -> Pointer:
        return Pointer(self.data, self.at + offset)


class Descriptor:
    """A 2-D tensor as the copy engine sees it, in blocks; elements outside read as 0."""

    layout = None

    def __init__(self, tensor: Tensor, rows: int, columns: int) -> None:
        assert tensor.dim() == 2 and tensor.is_contiguous()
        self.tensor, self.block, self.dtype = tensor, (rows, columns), tensor.dtype
        self.block_type = types.SimpleNamespace(nbytes=rows * columns * tensor.element_size())


class Shared:
    """Shared memory."""

    def __init__(self, tensor: Tensor, machine) -> None:
        self.tensor, self.machine = tensor, machine

    @property
    def place(self) -> int:
        """Address of the first element; distinguishes buffers, and the slots of a ring."""
        return self.tensor.data_ptr()

    def index(self, i: int) -> Shared:
        return Shared(self.tensor[i], self.machine)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.tensor.permute(order), self.machine)

    def load(self, layout) -> Tensor:
        """Warps read what copies brought or, after a barrier, what warps wrote."""
        assert self.machine.acting.written.get(self.place) is None, "no barrier came"
        return self.tensor.clone()

    def store(self, value: Tensor) -> None:
        assert (value.dtype, value.shape) == (self.tensor.dtype, self.tensor.shape)
        writer = self.machine.acting
        writer.overwrite(self)
        writer.written[self.place] = "by warps"
        self.tensor.copy_(value)


class Barrier:
    """Completes a phase when all arrivals and all expected bytes have come."""

    def __init__(self) -> None:
        self.count, self.phases = 1, 0
        self.arrivals, self.expected, self.arrived = 0, 0, 0
        self.copies: list[Callable[[], None]] = []
        self.arriving: Counter[int] = Counter()
        self.clock: Counter[int] = Counter()
        """Vector clock of the events before the last phase was complete."""

    def settle(self) -> None:
        if self.arrivals == self.count and self.expected == self.arrived:
            self.phases += 1
            self.clock |= self.arriving
            self.arrivals, self.expected, self.arrived = 0, 0, 0
