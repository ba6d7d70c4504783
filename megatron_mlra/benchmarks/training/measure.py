"""Timing of a case, compared with the matrix rate of the same GPU in the same run."""

from __future__ import annotations

import gc
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from megatron_mlra.benchmarks.training import kernels
from megatron_mlra.benchmarks.training.case import Load, Trainee, build_model, parse_case
from megatron_mlra.benchmarks.training.cases import Case
from megatron_mlra.benchmarks.training.worlds import user_buffers
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
    layout: str
    """`one`, or how the model is cut (layouts.py)."""
    gpus: int
    tokens: int
    """Of a step, all GPUs together."""
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
    """All GPUs together."""
    model_tflops: float
    hardware_tflops: float
    mfu: float
    """hardware_tflops over the matrix rate."""
    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    """Moments, and float32 copies of the weights."""
    activations_gib: float
    """What a micro-batch holds between forward and backward, logits and losses too, on the GPU that
    holds most: experts get different numbers of tokens."""
    peak_gib: float
    """Peak of allocated device memory, on the GPU that holds most."""
    loss: float
    """Mean loss of the step after the timed ones."""
    kernels: dict = field(default_factory=dict)
    """What a profile of two steps said (kernels.py), if one was asked for."""


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
    found: dict = {}
    args, _ = parse_case(case, load)
    with user_buffers(args):
        trainee = Trainee(case, load)
        try:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            times = sorted(time_calls(trainee.step, steps, warmup))
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            # Other stages of a pipeline report no loss.
            loss, peak, activations = _largest(float(trainee.step()[0]), peak, trainee.activations)
            held = trainee.held()
            if trace is not None:
                found = profile(trainee, trace, median(times))
        finally:
            trainee.close()
    if not 0 < loss < float("inf"):
        raise ValueError(f"{case}: the loss is {loss}")
    step, gpus = median(times), dist.get_world_size()
    rate = 1e3 * trainee.tokens / step
    flops = train_flops_per_token(trainee.shape)
    hardware = flops.hardware * rate / gpus / 1e12
    return Result(
        case=str(case),
        variant=case.variant if case.is_stock else trainee.shape.attention_variant,
        recipe=case.recipe,
        form="absorbed" if trainee.shape.absorbed else "materialized",
        seq_length=case.seq_length,
        layout=str(case.layout),
        gpus=gpus,
        tokens=trainee.tokens,
        parameters=parameters(trainee.shape).total,
        layers=load.num_layers,
        gate=gate,
        step_ms=step,
        spread_ms=times[int(0.8 * len(times))] - times[int(0.2 * len(times))],
        tokens_per_second=rate,
        model_tflops=flops.model * rate / gpus / 1e12,
        hardware_tflops=hardware,
        mfu=hardware / matmul,
        weights_gib=held["weights"] / 2**30,
        gradients_gib=held["gradients"] / 2**30,
        optimizer_gib=held["optimizer"] / 2**30,
        activations_gib=activations / 2**30,
        peak_gib=peak / 2**30,
        loss=loss,
        kernels=found,
    )


def _largest(*values: float) -> tuple[float, ...]:
    """Each value's largest over the ranks of this world."""
    numbers = torch.tensor(values, dtype=torch.float64).cuda()
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return tuple(numbers.tolist())


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


def profile(trainee: Trainee, trace: Path, step_ms: float) -> dict:
    """Write a Chrome trace of two steps of rank 0, and a text file of what it says (kernels.py).

    Only the device is traced: a trace of the host's calls too would make the host slower, and a
    step that waits for the host longer.

    Args:
        step_ms: of a step without the profiler.

    Returns:
        what the trace says; nothing on other ranks, or without a GPU.
    """

    def two_steps() -> None:
        for _ in range(2):
            trainee.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    if dist.get_rank():
        two_steps()
        return {}
    on_gpu = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profiler:
        two_steps()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    found = kernels.summary(kernels.read(trace), 2, step_ms)
    if found:
        trace.with_name(trace.name.split(".json")[0] + ".txt").write_text(kernels.text(found))
    return found


def free_memory() -> None:
    """Free the memory of the previous case and its compiled code. A function that meets a second
    shape would be compiled for all shapes, which is slower (SwiGLU by a factor of 3)."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
