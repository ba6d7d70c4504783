"""Prices every layout of a number of GPUs: the fastest that fit, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_mlra.command_line.numbers import largest_divisor
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.planner.gpus import GPU, Assumptions
from megatron_mlra.planner.layout import RECOMPUTES, Layout, attention_misfit, why_not
from megatron_mlra.planner.memory import GIB, Memory, memory
from megatron_mlra.planner.step import Step, predict

MICRO_BATCHES = (1, 2, 4, 8)
CONTEXT_PARALLEL = (1, 2, 4, 8, 16)
LEAST_TOKENS = 4096
"""Least tokens of a sequence per rank for which context parallelism is tried."""


@dataclass(frozen=True)
class Plan:
    """A layout with its memory and time."""

    layout: Layout
    memory: Memory
    step: Step

    def reason(self) -> str:
        """The two largest parts of the step's time besides matrix products, with their shares."""
        parts = {
            "tensor parallel": self.step.tensor,
            "expert parallel": self.step.expert,
            "context parallel": self.step.context,
            "pipeline bubble": self.step.bubble,
            "pipeline sends": self.step.pipeline,
            "exposed data parallel": self.step.data,
            "elementwise": self.step.elementwise,
        }
        largest = sorted(parts.items(), key=lambda item: -item[1])[:2]
        shares = (f"{name} {value / self.step.seconds:.0%}" for name, value in largest if value)
        return ", ".join(shares) or "computation alone"


@dataclass(frozen=True)
class Misfit:
    """A layout that does not fit, and the reason."""

    layout: Layout
    why: str


def layouts(
    shape: ModelDescription, gpus: int, gpu: GPU, tp_layout: str, cp: int | None
) -> Iterator[Layout]:
    """Every way to cut `gpus`, whether its memory fits or not.

    Args:
        cp: context-parallel size; None tries all of `context_sizes`.
    """
    for size in context_sizes(shape) if cp is None else (cp,):
        yield from _layouts(shape, gpus, gpu, tp_layout, size)


def context_sizes(shape: ModelDescription) -> list[int]:
    """The context-parallel sizes that leave at least `LEAST_TOKENS` per rank."""
    return [
        cp
        for cp in CONTEXT_PARALLEL
        if cp == 1 or (shape.attention in ("mlra", "gqa") and shape.seq_length >= cp * LEAST_TOKENS)
    ]


def _layouts(
    shape: ModelDescription, gpus: int, gpu: GPU, tp_layout: str, cp: int
) -> Iterator[Layout]:
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for tp in divisors:
        if tp > gpu.domain or attention_misfit(shape, tp, tp_layout):
            continue
        for pp in divisors:
            if gpus % (tp * pp * cp) or shape.num_layers % pp:
                continue
            per_stage = shape.num_layers // pp
            chunks = [v for v in range(1, per_stage + 1) if per_stage % v == 0] if pp > 1 else [1]
            dp = gpus // (tp * pp * cp)
            experts = [n for n in divisors if n <= shape.num_experts] or [1]
            for ep in experts:
                if (dp * cp) % ep:
                    continue
                for vpp in chunks[:3]:
                    yield Layout(tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, dp=dp, tp_layout=tp_layout)


def search(
    shape: ModelDescription,
    gpus: int,
    global_batch: int,
    gpu: GPU,
    assume: Assumptions,
    tp_layout: str = "head",
    cp: int | None = None,
    fp8: bool = False,
) -> tuple[list[Plan], list[Misfit]]:
    """Layouts that fit, the fastest first, one per cut, with its best micro-batch and
    recomputation; and layouts that do not fit, those with the least memory first.

    Raises:
        ValueError: this number of GPUs cannot be cut for the model.
    """
    if cp is not None and gpus % cp:
        fits = largest_divisor(gpus, cp)
        raise ValueError(f"--cp {cp} does not divide --gpus {gpus}; use {fits}")
    limit = gpu.memory_gb * 1e9 * assume.memory
    plans: list[Plan] = []
    misfits: list[tuple[float, Misfit]] = []
    seen = False
    for cut in layouts(shape, gpus, gpu, tp_layout, cp):
        seen = True
        best: Plan | None = None
        nearest: tuple[float, Misfit] | None = None
        for micro in MICRO_BATCHES:
            for recompute in RECOMPUTES:
                if "up_proj" in recompute and shape.attention != "mlra":
                    continue
                layout = replace(cut, micro_batch=micro, recompute=recompute)
                why = why_not(shape, layout, global_batch, gpu.domain)
                if why:
                    candidate = (float("inf"), Misfit(layout, why))
                    nearest = nearest or candidate
                    continue
                held = memory(shape, layout)
                if held.total > limit:
                    need = f"needs {held.total / GIB:.0f} GiB of {limit / GIB:.0f}"
                    largest = max(
                        ("weights", "gradients", "optimizer", "activations"),
                        key=lambda name: getattr(held, name),
                    )
                    why = f"{need}, {getattr(held, largest) / GIB:.0f} of it {largest}"
                    if nearest is None or held.total < nearest[0]:
                        nearest = (held.total, Misfit(layout, why))
                    continue
                plan = Plan(layout, held, predict(shape, layout, global_batch, gpu, assume, fp8))
                if best is None or plan.step.seconds < best.step.seconds:
                    best = plan
                break  # recomputing more only costs time
        if best is not None:
            plans.append(best)
        elif nearest is not None:
            misfits.append(nearest)
    if not seen:
        raise ValueError(
            f"--gpus {gpus}: no tensor and pipeline size divides both it and the model; use a"
            f" divisor of {shape.num_layers} layers times a power of two"
        )
    plans.sort(key=lambda plan: plan.step.seconds)
    misfits.sort(key=lambda item: item[0])
    return plans, [misfit for _, misfit in misfits]
