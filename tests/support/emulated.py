"""Emulates Gluon kernels for Hopper on the CPU with torch, one program at a time.

The emulator checks a kernel's results, its reads and writes, the phases of its barriers, and
asynchrony at the two extremes. Eager: a matrix product or bulk copy happens where it is started.
Lazy: it happens only where something waits for it. A buffer that is refilled or read too early
gives wrong numbers in one of the two modes. Shared memory is NaN at the start and during a copy.

Warps of a program may run apart: one warp may still read a buffer when another has waited for the
read. So a buffer may be overwritten only after every product that reads the buffer was waited for,
and a barrier of all warps came after the wait. Products may read memory written by warps only after
a fence and a barrier. The partitions of `gl.warp_specialize` run in threads that take turns;
between partitions, only a completed wait for an arrival orders such accesses, so each partition
keeps a vector clock. Layouts are not checked.
"""

from __future__ import annotations

import itertools
import sys
import threading
import types
from collections import Counter, deque
from collections.abc import Callable

import torch
from torch import Tensor

from support.emulated_memory import Barrier, Descriptor, Pointer, Shared


def launch(kernel, grid: tuple[int, ...], *, lazy: bool, warps: int, **arguments) -> None:
    """Run a `gluon.jit` function over a grid; tensors are given as Pointer or Descriptor.

    Lazy, partitions take turns in the reverse order too.
    """
    for program in itertools.product(*map(range, grid)):
        machine = _Machine(grid, program, lazy, warps, [])
        _on(machine, kernel)(**arguments)
        machine.finish()


class _Token:
    """The result of a product that may not be computed yet."""

    value: Tensor | None = None


class _Machine:
    """Implements the names of `gl` and of its Hopper module for one partition of one program."""

    float32, int64 = torch.float32, torch.int64
    exp2, log2 = staticmethod(torch.exp2), staticmethod(torch.log2)

    def __init__(self, grid, program, lazy: bool, warps: int, peers: list[_Machine]) -> None:
        self.grid, self.program, self.lazy, self.warps = grid, program, lazy, warps
        self.peers = peers
        """Partitions of the program, this one included."""
        self.acting = self
        """The partition whose turn it is, on the machine that allocates."""
        self.me = len(peers)
        peers.append(self)
        self.clock: Counter[int] = Counter({self.me: 1})
        """Vector clock: partition -> its last event that happened before this one's next event."""
        self.barriers: list[Barrier] = []
        self.yields: Callable[[], None] | None = None
        self.steps = 0
        """Number of waits that ended."""
        self.products: deque[Callable[[], None]] = deque()
        self.reading: deque[tuple[int, ...]] = deque()
        """Places read by the products not waited for, in the order of their start."""
        self.leaving: dict[int, Callable[[], None]] = {}
        """Place -> the copy out of shared memory that reads the place and was not waited for."""
        self.read: set[int] = set()
        """Places read, and waited for, since the last barrier."""
        self.written: dict[int, str] = {}
        """Place -> 'by warps' or 'fenced': places that warps wrote since the last barrier."""
        self.done: dict[str, dict[int, int]] = {"read": {}, "written": {}}
        """Place -> time on this partition's clock when all its warps were done with the place."""
        self.tma = types.SimpleNamespace(
            store_wait=self.store_wait,
        )
        self.mbarrier = types.SimpleNamespace(
            init=self.init,
            expect=self.expect,
            arrive=self.arrive,
            wait=self.wait,
            MBarrierLayout=lambda: Barrier,
        )
        layout = types.SimpleNamespace(get_default_for=lambda shape, dtype: None)
        self.NVMMASharedLayout = layout
        self.NVMMADistributedLayout = self.SliceLayout = self.BlockedLayout = lambda *a: None
        self.DotOperandLayout = self.SwizzledSharedLayout = self.SliceLayout

    def names(self) -> dict:
        """The globals that replace Gluon's in a kernel's code."""
        return {
            "gl": self,
            "tma": self.tma,
            "mbarrier": self.mbarrier,
            "fence_async_shared": self.fence,
            "barrier": self.thread_barrier,
            "async_load": self.copy_in,
            "async_store": self.copy_out,
            "async_atomic_add": self.add_out,
            "warpgroup_mma": self.product,
            "warpgroup_mma_wait": self.product_wait,
            "range": self.static_range,
        }

    def num_warps(self) -> int:
        return self.warps

    def num_programs(self, axis: int) -> int:
        return self.grid[axis]

    def program_id(self, axis: int) -> int:
        return self.program[axis]

    def thread_barrier(self) -> None:
        now = self.clock[self.me]
        self.done["read"] |= dict.fromkeys(self.read, now)
        self.read.clear()
        fenced = [at for at, how in self.written.items() if how == "fenced"]
        self.done["written"] |= dict.fromkeys(fenced, now)
        self.written = {at: how for at, how in self.written.items() if how != "fenced"}

    def fence(self) -> None:
        self.written = dict.fromkeys(self.written, "fenced")

    def overwrite(self, buffer: Shared) -> None:
        at = buffer.place
        for peer in self.peers:
            assert at not in peer.leaving, "a copy out reads this"
            assert all(at not in places for places in peer.reading), "a product reads this"
            assert at not in peer.read, "another warp's product may still read this"
            assert peer is self or at not in peer.written, "another partition writes this"
            when = max(peer.done[how].get(at, 0) for how in peer.done)
            assert when <= self.clock[peer.me], "another partition may still read this"

    def may_read(self, *places: int) -> None:
        for peer in self.peers:
            for at in places:
                assert at not in peer.written, "warps wrote this, and no fence and barrier came"
                when = peer.done["written"].get(at, 0)
                assert when <= self.clock[peer.me], "another partition may still write this"

    def warp_specialize(self, functions_and_args, worker_num_warps, worker_num_regs) -> None:
        """Run partitions in threads. One partition runs at a time, until it waits for something
        that has not happened."""
        assert worker_num_regs and all(registers % 8 == 0 for registers in worker_num_regs)
        turns = []
        for i, (function, arguments) in enumerate(functions_and_args):
            if i == 0:
                machine = self
            else:
                warps = worker_num_warps[i - 1]
                machine = _Machine(self.grid, self.program, self.lazy, warps, self.peers)
                machine.clock.update(self.clock)
            turns.append(_Turn(machine, _on(machine, function.kernel), arguments))
        if self.lazy:
            turns.reverse()
        while turns:
            before = [turn.machine.steps for turn in turns]
            for turn in turns:
                self.acting = turn.machine
                turn.run()
            left = [turn for turn in turns if not turn.over]
            moved = before != [turn.machine.steps for turn in turns]
            assert moved or len(left) < len(turns), "the partitions wait for each other"
            turns = left
        self.acting = self
        for machine in self.peers[1:]:
            machine.finish()

    def finish(self) -> None:
        self.drain(0)
        assert not self.leaving, "a copy out is still under way"
        for bar in self.barriers:
            assert not bar.expected and not bar.copies, "a copy is still under way"

    def static_range(self, *bounds: int):
        return range(*bounds)

    def cdiv(self, a: int, b: int) -> int:
        return -(-a // b)

    def minimum(self, a, b: int):
        return a.clamp(max=b) if isinstance(a, Tensor) else min(a, b)

    def maximum(self, a, b):
        return torch.maximum(a, b) if isinstance(a, Tensor) else max(a, b)

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

    def full(self, shape, value: float, dtype: torch.dtype, layout) -> Tensor:
        return torch.full(shape, value, dtype=dtype)

    def inline_asm_elementwise(self, asm: str, constraints: str, args: list, *_, **__) -> Tensor:
        assert asm == "mov.b32 $0, $1;"
        return args[0]

    def convert_layout(self, x: Tensor, layout) -> Tensor:
        return x

    def allocate_shared_memory(self, dtype: torch.dtype, shape, layout):
        if layout is Barrier:
            barriers = [Barrier() for _ in range(shape[0])]
            self.barriers += barriers
            return types.SimpleNamespace(index=barriers.__getitem__)
        return Shared(torch.full(shape, torch.nan, dtype=dtype), self)

    def load(self, pointer: Pointer, mask: Tensor | None = None, other: float = 0.0):
        if mask is None:
            value = pointer.data.view(-1)[pointer.at]
            return value if value.dim() else value.item()
        return torch.where(mask, pointer.data.flatten()[torch.where(mask, pointer.at, 0)], other)

    def store(self, pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        pointer.data.view(-1)[pointer.at[mask]] = value[mask]

    def init(self, bar: Barrier, count: int) -> None:
        bar.count = count

    def arrive(self, bar: Barrier, count: int) -> None:
        if self.warps == 1:
            self.thread_barrier()
        bar.arriving |= self.clock
        self.clock[self.me] += 1
        bar.arrivals += count
        bar.settle()

    def expect(self, bar: Barrier, size: int) -> None:
        bar.expected += size
        bar.arrivals += 1

    def copy_in(self, source: Descriptor, at, bar: Barrier, to: Shared) -> None:
        (row, column), (rows, columns) = at, source.block
        assert to.tensor.shape == (rows, columns)

        def land() -> None:
            part = source.tensor[row : row + rows, column : column + columns]
            assert part.size(1) == columns
            to.tensor.zero_()[: part.size(0)] = part
            bar.arrived += source.block_type.nbytes

        self.overwrite(to)
        to.tensor.fill_(torch.nan)
        bar.copies.append(land)
        if not self.lazy:
            self.land(bar)

    def land(self, bar: Barrier) -> None:
        for land in bar.copies:
            land()
        bar.copies.clear()
        bar.settle()

    def copy_out(self, to: Descriptor, at, source: Shared, *, add: bool = False) -> None:
        (row, column), (_, columns) = at, to.block
        self.may_read(source.place)
        part = to.tensor[row : row + to.block[0], column : column + columns]

        def leave() -> None:
            value = source.tensor[: part.size(0)]
            assert value.isfinite().all()
            part.copy_(part + value if add else value)

        if self.lazy:
            self.leaving[source.place] = leave
        else:
            leave()
            self.leaving[source.place] = lambda: None

    def add_out(self, to: Descriptor, at, source: Shared) -> None:
        self.copy_out(to, at, source, add=True)

    def store_wait(self, pending: int) -> None:
        assert pending == 0
        for leave in self.leaving.values():
            leave()
        self.read.update(self.leaving)
        self.leaving.clear()

    def wait(self, bar: Barrier, phase: int) -> None:
        self.land(bar)
        while bar.phases % 2 == phase:
            assert self.yields, "this wait never ends"
            self.yields()
            self.land(bar)
        self.clock |= bar.clock
        self.steps += 1

    def product(self, a, b: Shared, acc, *, use_acc: bool = True, is_async: bool) -> _Token:
        token = _Token()

        def run() -> None:
            left = a.tensor if isinstance(a, Shared) else a
            start = acc.value if isinstance(acc, _Token) else acc
            product = left.float() @ b.tensor.float()
            assert product.shape == start.shape
            token.value = product + start if use_acc else product

        assert is_async
        places = tuple(x.place for x in (a, b) if isinstance(x, Shared))
        self.may_read(*places)
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


class _Turn:
    """A partition in a thread of its own that runs only during calls of `run`."""

    def __init__(self, machine: _Machine, function: Callable, arguments: tuple) -> None:
        self.machine, self.over = machine, False
        self.error: BaseException | None = None
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        machine.yields = self.wait

        def body() -> None:
            self.go.acquire()
            try:
                function(*arguments)
            except BaseException as e:
                self.error = e
            self.over = True
            self.back.release()

        threading.Thread(target=body, daemon=True).start()

    def wait(self) -> None:
        self.back.release()
        self.go.acquire()

    def run(self) -> None:
        self.go.release()
        self.back.acquire()
        if self.error:
            raise self.error


def _on(machine: _Machine, kernel) -> types.FunctionType:
    """The kernel's Python function with the machine's names as globals; likewise the functions that
    the kernel calls."""
    module = vars(sys.modules[kernel.fn.__module__])
    names = dict(module)
    for name in kernel.fn.__code__.co_names:
        value = module.get(name)
        if type(value).__name__ == "constexpr":
            names[name] = value.value
        elif type(value) is type(kernel):
            names[name] = _on(machine, value)
    names |= machine.names()
    function = types.FunctionType(kernel.fn.__code__, names, kernel.fn.__name__)
    function.kernel = kernel
    return function
