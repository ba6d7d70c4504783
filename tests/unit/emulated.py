"""Gluon kernels for Hopper on the CPU: a program at a time, by torch.

Checks what a kernel computes, where it reads and writes, whether its barriers' phases add up, and
asynchrony at its two extremes. Eager, a matrix product or a bulk copy happens where it is begun;
lazy, only where something waits for it. A buffer that is refilled or read too early gives other
numbers in one of the two. Shared memory begins as NaN, and is NaN while a copy is under way.

Warps of a program may run apart: what one of them waited for, another may still be reading. So a
buffer may be written again only once every product that reads it was waited for and a barrier of
all warps came after that; and what warps wrote, products may read only after a fence and a barrier.
Not seen: layouts.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor


def launch(kernel, grid: tuple[int, ...], *, lazy: bool, warps: int, **arguments) -> None:
    """Run a `gluon.jit` function over a grid; tensors are given as Pointer or Descriptor."""
    for program in itertools.product(*map(range, grid)):
        machine = _Machine(grid, program, lazy, warps)
        _on(machine, kernel)(**arguments)
        machine.drain(0)


class Pointer:
    """Elements of a tensor, counted from its first."""

    def __init__(self, data: Tensor, at=0) -> None:
        assert data.is_contiguous()
        self.data, self.at = data, at

    def __add__(self, offset) -> Pointer:
        return Pointer(self.data, self.at + offset)

    def __getitem__(self, index) -> Pointer:
        return Pointer(self.data, self.at[index])


class Descriptor:
    """A 2-D tensor to the copy engine, in blocks; what lies outside reads as 0."""

    layout = None

    def __init__(self, tensor: Tensor, rows: int, columns: int) -> None:
        assert tensor.dim() == 2 and tensor.is_contiguous()
        self.tensor, self.block, self.dtype = tensor, (rows, columns), tensor.dtype
        self.block_type = types.SimpleNamespace(nbytes=rows * columns * tensor.element_size())


class _Int(int):
    """A scalar of a kernel, which knows `.to`."""

    def to(self, dtype: torch.dtype) -> _Int:
        return self


def _scalars(name: str) -> Callable:
    plain = getattr(int, name)

    def operation(self, other):
        result = plain(self, other)
        return _Int(result) if type(result) is int else result

    return operation


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "and"):
    setattr(_Int, f"__{_name}__", _scalars(f"__{_name}__"))


class _Shared:
    """Shared memory."""

    def __init__(self, tensor: Tensor, machine: _Machine) -> None:
        self.tensor, self.machine = tensor, machine

    @property
    def place(self) -> int:
        """Where it begins, which tells buffers and the slots of a ring apart."""
        return self.tensor.data_ptr()

    def index(self, i: int) -> _Shared:
        return _Shared(self.tensor[i], self.machine)

    def permute(self, order: tuple[int, ...]) -> _Shared:
        return _Shared(self.tensor.permute(order), self.machine)

    def store(self, value: Tensor) -> None:
        assert (value.dtype, value.shape) == (self.tensor.dtype, self.tensor.shape)
        self.machine.overwrite(self)
        self.machine.written[self.place] = "by warps"
        self.tensor.copy_(value)


class _Barrier:
    """Completes a phase when as many bytes have arrived as are expected."""

    def __init__(self) -> None:
        self.phases, self.expected, self.arrived = 0, 0, 0
        self.copies: list[Callable[[], None]] = []

    def settle(self) -> None:
        if self.expected and self.arrived == self.expected:
            self.phases, self.expected, self.arrived = self.phases + 1, 0, 0


class _Token:
    """The result of a product that may not have happened yet."""

    value: Tensor | None = None


class _Machine:
    """The names of `gl` and of its Hopper module, for one program."""

    float32, int64 = torch.float32, torch.int64
    exp2, log2 = staticmethod(torch.exp2), staticmethod(torch.log2)

    def __init__(self, grid, program, lazy: bool, warps: int) -> None:
        self.grid, self.program, self.lazy, self.warps = grid, program, lazy, warps
        self.products: deque[Callable[[], None]] = deque()
        self.reading: deque[tuple[int, ...]] = deque()
        """Places that products not waited for read, in the order they begin."""
        self.read: set[int] = set()
        """Places that products waited for read, since the last barrier."""
        self.written: dict[int, str] = {}
        """Places that warps wrote: 'by warps', 'fenced', until a barrier."""
        self.tma = types.SimpleNamespace(
            async_copy_global_to_shared=self.copy_in,
            async_copy_shared_to_global=self.copy_out,
            store_wait=lambda pending: None,
        )
        self.mbarrier = types.SimpleNamespace(
            init=lambda bar, count: None,
            expect=self.expect,
            wait=self.wait,
            invalidate=self.invalidate,
            MBarrierLayout=lambda: _Barrier,
        )
        layout = types.SimpleNamespace(get_default_for=lambda shape, dtype: None)
        self.NVMMASharedLayout = layout
        self.NVMMADistributedLayout = self.SliceLayout = self.BlockedLayout = lambda *a: None
        self.DotOperandLayout = self.SliceLayout

    def names(self) -> dict:
        """Globals that a kernel's code sees in place of Gluon's."""
        return {
            "gl": self,
            "tma": self.tma,
            "mbarrier": self.mbarrier,
            "fence_async_shared": self.fence,
            "warpgroup_mma": self.product,
            "warpgroup_mma_wait": self.product_wait,
            "range": self.static_range,
        }

    def num_warps(self) -> int:
        return self.warps

    def num_programs(self, axis: int) -> _Int:
        return _Int(self.grid[axis])

    def program_id(self, axis: int) -> _Int:
        return _Int(self.program[axis])

    def thread_barrier(self) -> None:
        self.read.clear()
        self.written = {at: how for at, how in self.written.items() if how != "fenced"}

    def fence(self) -> None:
        self.written = dict.fromkeys(self.written, "fenced")

    def overwrite(self, buffer: _Shared) -> None:
        assert all(buffer.place not in places for places in self.reading), "a product reads this"
        assert buffer.place not in self.read, "another warp's product may still read this"

    def static_range(self, *bounds: int):
        return (_Int(i) for i in range(*bounds))

    def cdiv(self, a: int, b: int) -> _Int:
        return _Int(-(-a // b))

    def minimum(self, a: int, b: int) -> _Int:
        return _Int(min(a, b))

    def maximum(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b)

    def max(self, x: Tensor, axis: int) -> Tensor:
        return x.amax(axis)

    def sum(self, x: Tensor, axis: int) -> Tensor:
        return x.sum(axis)

    def where(self, condition: Tensor, a: Tensor, b: float) -> Tensor:
        return torch.where(condition, a, b)

    def arange(self, start: int, stop: int, layout) -> Tensor:
        return torch.arange(start, stop)

    def zeros(self, shape, dtype: torch.dtype, layout) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def convert_layout(self, x: Tensor, layout) -> Tensor:
        return x

    def allocate_shared_memory(self, dtype: torch.dtype, shape, layout):
        if layout is _Barrier:
            return types.SimpleNamespace(index=[_Barrier() for _ in range(shape[0])].__getitem__)
        return _Shared(torch.full(shape, torch.nan, dtype=dtype), self)

    def load(self, pointer: Pointer, mask: Tensor, other: float) -> Tensor:
        return torch.where(mask, pointer.data.flatten()[torch.where(mask, pointer.at, 0)], other)

    def store(self, pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        pointer.data.view(-1)[pointer.at[mask]] = value[mask]

    def atomic_add(self, pointer: Pointer, value: Tensor, mask=True, sem: str = "") -> None:
        at, mask = pointer.at.expand_as(value), torch.as_tensor(mask).expand_as(value)
        assert value[mask].isfinite().all()
        pointer.data.view(-1).index_add_(0, at[mask], value[mask])

    def expect(self, bar: _Barrier, size: int) -> None:
        bar.expected += size

    def copy_in(self, source: Descriptor, at, bar: _Barrier, to: _Shared) -> None:
        (row, column), (rows, columns) = at, source.block
        assert to.tensor.shape == (rows, columns)

        def land() -> None:
            part = source.tensor[row : row + rows, column : column + columns]
            assert part.size(1) == columns and part.size(0) > 0
            to.tensor.zero_()[: part.size(0)] = part
            bar.arrived += source.block_type.nbytes

        self.overwrite(to)
        to.tensor.fill_(torch.nan)
        bar.copies.append(land)
        if not self.lazy:
            self.land(bar)

    def land(self, bar: _Barrier) -> None:
        for land in bar.copies:
            land()
        bar.copies.clear()
        bar.settle()

    def copy_out(self, to: Descriptor, at, source: _Shared) -> None:
        (row, column), (_, columns) = at, to.block
        assert source.place not in self.written, "warps wrote this, and no fence and barrier came"
        part = to.tensor[row : row + to.block[0], column : column + columns]
        part.copy_(source.tensor[: part.size(0)])

    def wait(self, bar: _Barrier, phase: int, pred: bool = True) -> None:
        if pred:
            self.land(bar)
            assert bar.phases % 2 != phase, "this wait never ends"

    def invalidate(self, bar: _Barrier) -> None:
        assert not bar.expected and not bar.copies, "a copy is still under way"

    def product(self, a, b: _Shared, acc, *, use_acc: bool = True, is_async: bool) -> _Token:
        token = _Token()

        def run() -> None:
            left = a.tensor if isinstance(a, _Shared) else a
            start = acc.value if isinstance(acc, _Token) else acc
            product = left.float() @ b.tensor.float()
            assert product.shape == start.shape
            token.value = product + start if use_acc else product

        assert is_async
        places = tuple(x.place for x in (a, b) if isinstance(x, _Shared))
        assert not self.written.keys() & places, "warps wrote this, and no fence and barrier came"
        self.reading.append(places)
        self.products.append(run)
        if not self.lazy:
            self.drain(0)
        return token

    def drain(self, left: int) -> None:
        while len(self.products) > left:
            self.products.popleft()()

    def product_wait(self, left: int, deps: list):
        self.drain(left)
        while len(self.reading) > left:
            self.read.update(self.reading.popleft())
        values = [d.value if isinstance(d, _Token) else d for d in deps]
        assert all(value is not None for value in values), "waits for too few products"
        return values[0] if len(values) == 1 else values


def _on(machine: _Machine, kernel) -> types.FunctionType:
    """The kernel's Python code over the machine's names, and so the functions it calls."""
    module = vars(sys.modules[kernel.fn.__module__])
    names = dict(module)
    for name in kernel.fn.__code__.co_names:
        value = module.get(name)
        if type(value).__name__ == "constexpr":
            names[name] = value.value
        elif type(value) is type(kernel):
            names[name] = _on(machine, value)
    names |= machine.names()
    return types.FunctionType(kernel.fn.__code__, names, kernel.fn.__name__)
