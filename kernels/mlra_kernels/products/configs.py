"""How a product of few rows is cut, and up to how many rows it is this package's."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from mlra_kernels.interpreter import INTERPRETED

MOST_TOKENS = 2
"""Rows of x up to which products are this package's; this is the one place that says so.

Each row costs a multiply-add for each weight in ordinary float32 arithmetic, while cuBLAS takes
tensor cores and as long for four rows as for one. On an H200 a decoding step of MLRA-4's 2.9B shape
at 8K took 0.77 of its time with cuBLAS at one row and 0.89 at two (docs/performance/decoding.md),
and 2.1 at eight (docs/log/kernels.md)."""

PROGRAMS = 792
"""Programs that a product should have at least: six on each of 132 multiprocessors, so that no
multiprocessor waits long for the last."""


def few(tokens: int) -> bool:
    """Whether so many rows of x are few enough."""
    return 1 <= tokens <= MOST_TOKENS


@dataclass(frozen=True)
class ProductConfig:
    """The cut of one product."""

    rows: int
    """Rows of W, or pairs of rows, of a block; a power of two."""
    chunk: int
    """Columns of W that a program reads at once; a power of two of at least 256."""
    warps: int
    """Warps of a program. A thread reads `chunk / (256 warps)` times 16 bytes of a row."""
    persistent: int = 0
    """Programs a multiprocessor, which take blocks in turn; 0: a program a block."""

    def __post_init__(self) -> None:
        for name, least, most in (("rows", 1, 1024), ("chunk", 64, 8192), ("warps", 1, 16)):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value <= most or value & (value - 1):
                raise ValueError(f"{name} is {value!r}: give a power of two from {least} to {most}")
        if not isinstance(self.persistent, int) or not 0 <= self.persistent <= 32:
            raise ValueError(f"persistent is {self.persistent!r}: give an integer from 0 to 32")


def default_config(outputs: int, inputs: int, pairs: bool) -> ProductConfig:
    """A cut for any W `[outputs, inputs]`: 4 warps that read 8 KB, of fewer rows where there would
    be few programs, of fewer columns where a row is short.

    There is no table of better cuts: those that were best alone, 10 % faster over a layer, changed
    nothing at the step (docs/log/kernels.md)."""
    chunk = min(1024, max(256, triton.next_power_of_2(inputs)))
    count = outputs // 2 if pairs else outputs
    rows = 2 if pairs else 4
    if INTERPRETED:  # which takes as long for a program of many rows as of one
        return ProductConfig(min(1024, triton.next_power_of_2(count)), chunk, 4)
    while rows > 1 and count // rows < PROGRAMS:
        rows //= 2
    return ProductConfig(rows, chunk, max(1, chunk // 256))


def candidates(inputs: int, pairs: bool) -> list[ProductConfig]:
    """The cuts that a benchmark tries for rows of `inputs` columns."""
    found = []
    for rows, chunk, warps, persistent in (
        (1, 1024, 1, 0), (2, 1024, 1, 0), (4, 512, 1, 0), (1, 1024, 4, 0), (2, 1024, 4, 0),
        (4, 1024, 4, 0), (8, 1024, 4, 0), (2, 2048, 4, 0), (4, 2048, 4, 0), (2, 2048, 8, 0),
        (4, 2048, 8, 0), (4, 512, 2, 0), (2, 512, 2, 0), (8, 512, 2, 0), (2, 1024, 4, 8),
        (4, 1024, 4, 4), (4, 1024, 4, 6), (8, 1024, 4, 3), (4, 2048, 8, 3), (2, 1024, 1, 20),
        (4, 512, 2, 12),
    ):  # fmt: skip
        if chunk > max(256, triton.next_power_of_2(inputs)):
            continue
        if pairs and rows > 1:
            rows //= 2
        config = ProductConfig(rows, chunk, warps, persistent)
        if config not in found:
            found.append(config)
    return found


def heads_cut(heads: int, inputs: int, outputs: int) -> tuple[int, int]:
    """(Inputs of a tile, columns of a program) of the products per head: columns so that 90
    programs start, of 32 bytes at least, and tiles of at most 8192 numbers."""
    columns = max(16, min(64, triton.next_power_of_2(outputs)))
    while columns > 16 and heads * -(-outputs // columns) < 90:
        columns //= 2
    return min(8192 // columns, max(64, triton.next_power_of_2(inputs))), columns
