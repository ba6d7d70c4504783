"""Where the time of a decoding step goes: its kernels, traced while the captured step is replayed.

A kernel that is launched programmatically may start while the one in front still runs, and then
waits for it (mlra_kernels/products/kernel.py). Its whole time includes that wait. So here a
kernel's time is what it adds: from the latest end of those that started before it, or from its own
start if that is later, to its own end. These times sum to the time in which any kernel runs.

Tracing can change how kernels overlap: compare `step_us` with the time of a step without it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from megatron_mlra.benchmarks.training.kernels import is_communication, short_name
from megatron_mlra.command_line.figures import tokens
from mlra_kernels.benchmarks.timing import Launch, gpu_launches

STEPS = 10
"""Replays that are summed."""
MARK, MARK_CYCLES = "spin_kernel", 100_000
"""Part of the name of the kernel of `torch.cuda._sleep`, which runs between replays. It tells them
apart, and the host launches the next replay meanwhile."""
ROWS = 24
"""Most rows of a table."""

EPILOGUES = {
    "plain": "", "add": " + residual", "gate": " + gate", "swiglu": " + SwiGLU", "rotate": " + RoPE"
}  # fmt: skip
ROLES = {
    r"latent_decode_(hopper_)?kernel|grouped_decode_kernel": "attention",
    r"combine_kernel": "attention: merge of parts",
    # Of the parts of grouped queries, and of ranks over which tokens are cut: the name is the same.
    r"merge_states_kernel": "attention: merge of parts or ranks",
    r"schedule_kernel": "attention: schedule",
    r"latent_cache_append_kernel": "cache append",
    r"one_shot_kernel": "sum over ranks + residual + norm",
    r"_add_rms_norm_kernel|rms_norm_forward": "norm",
    r"_silu_mul_kernel": "SwiGLU",
    r"_rotate_heads_kernel": "RoPE",
}
"""Whole names of the project's kernels -> what they do. Products name their shapes too."""


def profile_step(step: Callable[[], object]) -> dict[str, Any]:
    """The kernels of a step on this rank's GPU, as `summary` tells them.

    Args:
        step: launches a warm step on the current stream, the same each time. In a world, every
            rank's must be profiled at once; times of sums over ranks include waits for the others.
    """
    torch.cuda.synchronize()
    cuda = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[cuda]) as profiler:
        # One more: a trace's first launches may be lost, since it matches two clocks at its start.
        for _ in range(1 + STEPS):
            torch.cuda._sleep(MARK_CYCLES)
            step()
        torch.cuda._sleep(MARK_CYCLES)
        torch.cuda.synchronize()
    return summary(list(replays(gpu_launches(profiler)))[-STEPS:])


def replays(launches: Iterable[Launch]) -> Iterator[list[Launch]]:
    """The launches of each whole replay, from a mark to the next, in order of their starts."""
    found: list[Launch] | None = None
    for launch in sorted(launches, key=lambda launch: launch[1]):
        if MARK not in launch[0]:
            if found is not None:
                found.append(launch)
            continue
        if found:
            yield found
        found = []


def summary(steps: list[list[Launch]]) -> dict[str, Any]:
    """Means of one step.

    Args:
        steps: the launches of each step, in order of their starts: name, start and duration in
            nanoseconds.

    Returns:
        `steps`: how many; `step_us`: from the first start to the last end; `busy_us`: any kernel
        runs (the union of their intervals); `idle_us`: none runs between two (the gaps);
        `launches`; `kernels`, the most time first: `name`; `what`: see `role`; `launches`; `us`:
        see above, so that they sum to `busy_us`; `share`: of `step_us`. Or `error`: the tracer saw
        none.
    """
    steps = [step for step in steps if step]
    if not steps:
        return {"error": "the tracer saw no kernel of a whole step"}
    counts: Counter[str] = Counter()
    busy: Counter[str] = Counter()
    span = 0
    for step in steps:
        first = latest = step[0][1]
        for name, start, duration in step:
            end = start + duration
            counts[name] += 1
            busy[name] += max(0, end - max(start, latest))
            latest = max(latest, end)
        span += latest - first
    unit = 1e-3 / len(steps)
    return {
        "steps": len(steps),
        "step_us": span * unit,
        "busy_us": busy.total() * unit,
        "idle_us": (span - busy.total()) * unit,
        "launches": counts.total() / len(steps),
        "kernels": [
            {
                "name": name, "what": role(name), "launches": counts[name] / len(steps),
                "us": ns * unit, "share": ns / max(span, 1),
            }
            for name, ns in busy.most_common()
        ],
    }  # fmt: skip


def role(name: str) -> str:
    """What a kernel of this name does, as far as its name tells; else its short name."""
    if product := re.fullmatch(r"product_kernel_([a-z]+)_(\d+)x(\d+)", name):
        epilogue, outputs, inputs = product.groups()
        return f"product {inputs} to {outputs}{EPILOGUES.get(epilogue, f' + {epilogue}')}"
    if product := re.fullmatch(r"heads_kernel_(\d+)to(\d+)", name):
        return f"product per head {product[1]} to {product[2]}"
    for pattern, what in ROLES.items():
        if re.fullmatch(pattern, name):
            return what
    if is_communication(name):
        return "collective of NCCL"
    if re.search(r"gemm|gemv|nvjet|cublas|splitk", name, re.IGNORECASE):
        return "product of cuBLAS"
    return short_name(name)


def profile_table(record: dict[str, Any]) -> str:
    """Markdown: microseconds of a step by what its kernels do, the most first; or why there are
    none.

    Args:
        record: with a `profile`.
    """
    told = record["profile"]
    where = f"{record['label']}, {record['batch']} x {tokens(record['context'])}"
    if "error" in told:
        return f"{where}: no profile: {told['error']}"
    counts: Counter[str] = Counter()
    busy: Counter[str] = Counter()
    for kernel in told["kernels"]:
        counts[kernel["what"]] += kernel["launches"]
        busy[kernel["what"]] += kernel["us"]
    rows = [(what, counts[what], us) for what, us in busy.most_common()]
    if len(rows) > ROWS:
        rest = rows[ROWS - 1 :]
        rows[ROWS - 1 :] = [(f"{len(rest)} others", *(sum(row[i] for row in rest) for i in (1, 2)))]
    lines = [
        f"{where}: {told['step_us']:.0f} us a step when traced, {told['launches']:g} launches,"
        f" busy {told['busy_us']:.0f} us, idle {told['idle_us']:.0f} us",
        "",
        "| what | launches | us | share |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {what} | {launches:g} | {us:.1f} | {100 * us / max(told['step_us'], 1e-3):.1f} % |"
        for what, launches, us in rows
    ]
    return "\n".join(lines)
