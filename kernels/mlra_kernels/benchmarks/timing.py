"""Timing on a GPU by CUDA-graph replays, what a profiler saw there, and the memory roof, measured
with plain torch."""

import statistics
from collections.abc import Callable, Sequence

import torch

Launch = tuple[str, int, int]
"""A kernel or copy on the GPU: name, start and duration in nanoseconds."""


def milliseconds(call: Callable[[], object]) -> float:
    """The GPU's time of one call, on a stream with nothing else to do."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def graph_microseconds(
    calls: Sequence[Callable[[], object]], *, min_calls: int = 12, replays: int = 15
) -> float:
    """The median time of one call in microseconds, measured by replays of a CUDA graph.

    The graph runs `calls` in turn, repeated to at least `min_calls` calls. Give one call for each
    of several sets of inputs, so that a replay does not find its inputs in the L2 cache.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = -(-min_calls // len(calls))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        times = [milliseconds(graph.replay) for _ in range(replays + 3)][3:]
    finally:
        # NCCL does not end while a graph with its collectives lives, as in an error's traceback.
        graph.reset()
    return statistics.median(times) * 1e3 / (rounds * len(calls))


def stream_microseconds(call: Callable[[], object]) -> float:
    """The median time of one call in microseconds, of 7 times 4 in a row without a CUDA graph.

    For calls whose GPU time exceeds the time of their launch.
    """
    for _ in range(3):
        call()

    def four() -> None:
        for _ in range(4):
            call()

    return statistics.median(milliseconds(four) for _ in range(7)) * 1e3 / 4


def gpu_launches(profiler: torch.profiler.profile) -> list[Launch]:
    """What a stopped profiler with CUDA activity saw on the GPU."""
    return [
        (event.name(), event.start_ns(), event.duration_ns())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]


def read_roof() -> float:
    """The read bandwidth in bytes per second: a sum over 4 GiB, the best of 3 measurements."""
    x = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    best = min(graph_microseconds([x.sum], min_calls=2, replays=5) for _ in range(3))
    return x.nbytes / best * 1e6


def copy_roof() -> float:
    """The copy bandwidth in bytes per second, read plus written bytes."""
    x = torch.ones(1 << 29, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / graph_microseconds([lambda: y.copy_(x)], min_calls=2) * 1e6
