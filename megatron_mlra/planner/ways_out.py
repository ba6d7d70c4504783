"""Where no layout fits: the nearest numbers of GPUs, and batch sizes, that some layout does fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.planner.command import NODE
from megatron_mlra.planner.gpus import GPU, Assumptions
from megatron_mlra.planner.layout import RECOMPUTES, why_not
from megatron_mlra.planner.memory import memory
from megatron_mlra.planner.search import layouts

TRIES = 16
"""How many numbers of GPUs next to the given one are tried on either side: up to a node any, then
whole nodes. Beyond, powers of two are tried."""
MOST_GPUS = 2**14


def ways_out(
    shape: ModelDescription,
    gpus: int,
    global_batch: int,
    gpu: GPU,
    assume: Assumptions,
    tp_layout: str,
    cp: int | None,
) -> str:
    """What to give in place of `gpus` or `global_batch`, which no layout fits; empty if unknown.

    Args: see `search`.
    """

    limit = gpu.memory_gb * 1e9 * assume.memory
    # Of each cut, micro-batches of one sequence need the least memory, and divide the most batches.
    recomputes = [x for x in RECOMPUTES if "up_proj" not in x or shape.attention == "mlra"]

    def is_possible(count: int, batch: int = global_batch) -> bool:
        for cut in layouts(shape, count, gpu, tp_layout, cp):
            if why_not(shape, cut, batch, gpu.domain):
                continue
            tried = (replace(cut, recompute=name) for name in recomputes)
            if any(memory(shape, layout).total <= limit for layout in tried):
                return True
        return False

    sizes = [*range(1, NODE), *range(NODE, MOST_GPUS + 1, NODE)]
    below = [count for count in sizes if count < gpus][: -TRIES - 1 : -1]
    above = [count for count in sizes if count > gpus][:TRIES]
    doubled = [2**n for n in range(15) if above and above[-1] < 2**n]
    counts = [_first(below, is_possible), _first([*above, *doubled], is_possible)]
    found = [str(count) for count in counts if count]
    said = [f"--gpus {' or '.join(found)}"] if found else []
    multiples = {global_batch // gpus * gpus, -(-global_batch // gpus) * gpus} - {0, global_batch}
    nearest = sorted(multiples, key=lambda batch: abs(batch - global_batch))
    batch = _first(nearest, lambda batch: is_possible(gpus, batch))
    if batch:
        said.append(f"--global-batch-size {batch}")
    return ", or ".join(said)


def _first(values: Iterable[int], is_right: Callable[[int], bool]) -> int | None:
    return next((value for value in values if is_right(value)), None)
