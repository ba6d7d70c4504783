"""The speed of a run: tokens per second, FLOP rates, MFU, peak memory, the time that is left.

The model's FLOPs of a token (cost/flops.py) do not depend on the form of the core. MFU is the rate
of the model's FLOPs over the GPU's stated dense rate (planner/gpus.py): the FP8 rate where the run
uses FP8, else the BF16 rate. On a CPU there is no MFU.
"""

from __future__ import annotations

import resource
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_mlra.command_line.log_line import duration
from megatron_mlra.cost.flops import TrainFlops
from megatron_mlra.planner import gpus

GIB = 2**30


class Clock:
    """Times training steps. Evaluation and saving do not count in the rate."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.paused = 0.0
        self.start: tuple[int, float] | None = None
        self.first: tuple[int, float] | None = None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock inside this context."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - begin

    def begin(self, step: int) -> None:
        """Start measuring after `step`."""
        self.start = (self.args.consumed_train_samples, time.perf_counter())
        self.first = self.first or (step, self.start[1])
        self.paused = 0.0

    def rate(self, step: int) -> float | None:
        """Tokens per second since the last `begin`, or None before a step was measured; calls
        `begin`."""
        if self.start is None:
            self.begin(step)
            return None
        samples = self.args.consumed_train_samples - self.start[0]
        seconds = time.perf_counter() - self.start[1] - self.paused
        self.begin(step)
        return samples * self.args.seq_length / seconds if samples and seconds > 0 else None

    def left(self, step: int) -> float | None:
        """Seconds until the last step, or None before a step was measured.

        The estimate is the mean time per step so far, evaluation and saving included.
        """
        if self.first is None or step <= self.first[0]:
            return None
        per_step = (time.perf_counter() - self.first[1]) / (step - self.first[0])
        return per_step * (self.args.train_iters - step)


def peak_memory() -> float:
    """Peak memory so far in GiB, of the rank with the most: allocated on a GPU, resident on a CPU.

    All ranks call this together.
    """
    if torch.cuda.is_available():
        held = torch.cuda.max_memory_allocated()
    else:
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    most = torch.tensor([held / GIB], dtype=torch.float64, device="cuda")
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return most.item()


class Speed:
    """Converts a rate in tokens per second into FLOP rates and MFU.

    Args:
        flops: FLOPs per token.
        devices: number of devices that share the work.
        device: torch's name of the GPU, None on a CPU.
        fp8: whether matrix products run in FP8.
        at_most: whether FLOP rates are upper bounds: packed sequences score fewer pairs of query
            and key than the FLOPs count.
    """

    def __init__(
        self, flops: TrainFlops, devices: int, device: str | None, fp8: bool, at_most: bool
    ) -> None:
        self.flops, self.devices, self.at_most = flops, devices, at_most
        self.has_gpu = device is not None
        gpu = gpus.of_device(device) if device else None
        self.peak = (gpu.fp8_tflops if fp8 else gpu.bf16_tflops) if gpu else 0.0

    def curves(self, rate: float) -> dict[str, float]:
        """Points of the curves: the rate, FLOP rates per device, and MFU where the GPU is known.

        Args:
            rate: tokens per second of all devices together.
        """
        model, hardware = (rate * flops / self.devices / 1e12 for flops in self.flops)
        found = {
            "tokens per second": rate,
            "model TFLOP per second and device": model,
            "hardware TFLOP per second and device": hardware,
        }
        return found | ({"MFU": model / self.peak} if self.peak else {})

    def parts(self, rate: float) -> list[str]:
        """Parts of the line: tokens/s, and on a GPU the MFU, or TFLOP/s if its peak is unknown."""
        said = [f"{rate:,.0f} tokens/s"]
        if self.has_gpu:
            found = self.curves(rate)
            at_most = "at most " if self.at_most else ""
            if self.peak:
                said.append(f"MFU {at_most}{100 * found['MFU']:.1f} %")
            else:
                tflops = found["model TFLOP per second and device"]
                said.append(f"{at_most}{tflops:.3g} TFLOP/s a GPU")
        return said


def speed(args: Namespace, flops: TrainFlops) -> Speed:
    """The `Speed` for this run's devices."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packed = args.dataloader_inter_document_masking
    return Speed(flops, args.world_size, device, bool(args.fp8), packed)


def parts(
    speed: Speed, rate: float | None, memory: float, left: float | None
) -> tuple[list[str], dict[str, float]]:
    """The line's parts about the machine, and the points of the curves.

    Args:
        rate: tokens per second, None where no step was measured.
        memory: peak memory, GiB.
        left: seconds until the end of the run, None where unknown.
    """
    said, points = [f"{memory:.1f} GiB"], {"peak memory GiB": memory}
    if rate is not None:
        said[:0] = speed.parts(rate)
        points |= speed.curves(rate)
    if left is not None:
        said.append(f"{duration(left)} left")
        points["hours left"] = left / 3600
    return said, points
