"""Timing of a case, compared with the matrix rate of the same GPU in the same run."""

from __future__ import annotations

import gc
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from megatron_mlra.benchmarks.training.case import Case, Load, Trainee, build_model, parse_case
from megatron_mlra.cost.flops import train_flops_per_token
from megatron_mlra.cost.parameters import parameters


@dataclass
class Result:
    """One row. Rates are in TFLOP/s per device."""

    case: str
    variant: str
    recipe: str
    form: str
    seq_length: int
    tokens: int
    parameters: int
    layers: int
    gate: float
    """Largest relative gradient difference against the torch layers; 0 where there is nothing to
    compare with (Megatron's own MLA, experts)."""
    step_ms: float
    """Median over the timed steps."""
    spread_ms: float
    """80th minus 20th percentile of the timed steps."""
    tokens_per_second: float
    model_tflops: float
    hardware_tflops: float
    mfu: float
    """hardware_tflops over the matrix rate."""
    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    """Moments, and float32 copies of the weights."""
    activations_gib: float
    """What a micro-batch holds between forward and backward, logits and losses too."""
    peak_gib: float
    """Peak of allocated device memory."""
    loss: float
    """Mean loss of the step after the timed ones."""


def matmul_tflops() -> float:
    """TFLOP/s of a square bf16 product of random matrices, from the median of single timings."""
    on_gpu = torch.cuda.is_available()
    size, repeats, dtype = (8192, 10, torch.bfloat16) if on_gpu else (512, 3, torch.float32)
    a, b = (torch.randn(size, size, dtype=dtype).cuda() for _ in range(2))
    times = time_calls(lambda: a @ b, repeats, 3)
    return 2 * size**3 / median(times) / 1e9


def time_calls(call, repeats: int, warmup: int) -> list[float]:
    """Milliseconds of each of `repeats` calls; by device events if there is a GPU."""
    for _ in range(warmup):
        call()
    if not torch.cuda.is_available():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def measure(
    case: Case, load: Load, gate: float, matmul: float, steps: int, warmup: int, trace: Path | None
) -> Result:
    """Time `steps` training steps after `warmup` others.

    Args:
        gate: result of `gate.check`, for the row.
        matmul: TFLOP/s of the matrix rate, the denominator of MFU.
        trace: file for a profiler trace of two more steps, or None.
    """
    free_memory()
    trainee = Trainee(case, load)
    try:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        times = sorted(time_calls(trainee.step, steps, warmup))
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        loss = float(trainee.step()[0])
        held = trainee.held()
        if trace is not None:
            profile(trainee, trace)
    finally:
        trainee.close()
    step = median(times)
    rate = 1e3 * trainee.tokens / step
    flops = train_flops_per_token(trainee.shape)
    return Result(
        case=str(case),
        variant=case.variant if case.is_stock else trainee.shape.attention_variant,
        recipe=case.recipe,
        form="absorbed" if trainee.shape.absorbed else "materialized",
        seq_length=case.seq_length,
        tokens=trainee.tokens,
        parameters=parameters(trainee.shape).total,
        layers=load.num_layers,
        gate=gate,
        step_ms=step,
        spread_ms=times[int(0.8 * len(times))] - times[int(0.2 * len(times))],
        tokens_per_second=rate,
        model_tflops=flops.model * rate / 1e12,
        hardware_tflops=flops.hardware * rate / 1e12,
        mfu=flops.hardware * rate / 1e12 / matmul,
        weights_gib=held["weights"] / 2**30,
        gradients_gib=held["gradients"] / 2**30,
        optimizer_gib=held["optimizer"] / 2**30,
        activations_gib=trainee.activations / 2**30,
        peak_gib=peak / 2**30,
        loss=loss,
    )


@dataclass
class SublayerResult:
    """The attention sublayer alone: median milliseconds, and MiB besides weights and input."""

    case: str
    form: str
    tokens: int
    forward_ms: float
    total_ms: float
    """Forward and backward with all gradients."""
    saved_mib: float
    """Memory between forward and backward, including the output."""
    peak_mib: float
    """Peak during forward and backward."""


def measure_sublayer(case: Case, load: Load, repeats: int) -> SublayerResult:
    """Time forward and backward of one attention sublayer on random hidden states."""
    free_memory()
    single = Load(1, load.tokens, 1, load.ffn_multiple, load.flags)
    args, config = parse_case(
        case, single, "--no-zero-init-output", "--no-gradient-accumulation-fusion"
    )
    attention = build_model(case, args, config).decoder.layers[0].self_attention
    shape = (case.seq_length, args.micro_batch_size, args.hidden_size)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    x = torch.randn(shape, dtype=dtype).cuda().requires_grad_()
    upstream = torch.randn(shape, dtype=dtype).cuda()
    held, leaves = [0, 0], [x, *attention.parameters()]
    on_gpu = torch.cuda.is_available()

    def forward():
        for leaf in leaves:
            leaf.grad = None
        start = torch.cuda.memory_allocated() if on_gpu else 0
        output, _ = attention(x, None)
        held[0] = torch.cuda.memory_allocated() - start if on_gpu else 0
        return output

    def both():
        start = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        forward().backward(upstream)
        held[1] = torch.cuda.max_memory_allocated() - start if on_gpu else 0

    total = median(time_calls(both, repeats, 5))
    return SublayerResult(
        case=str(case),
        form="absorbed" if getattr(config, "absorbed", False) else "materialized",
        tokens=shape[0] * shape[1],
        forward_ms=median(time_calls(forward, repeats, 2)),
        total_ms=total,
        saved_mib=held[0] / 2**20,
        peak_mib=held[1] / 2**20,
    )


def profile(trainee: Trainee, trace: Path) -> None:
    """Write a Chrome trace of two steps, and a text file with a table of kernels by time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(2):
            trainee.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=90)
    trace.with_suffix(".txt").write_text(table)


def free_memory() -> None:
    """Free the memory of the previous case and its compiled code. A function that meets a second
    shape would be compiled for all shapes, which is slower (SwiGLU by a factor of 3)."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
