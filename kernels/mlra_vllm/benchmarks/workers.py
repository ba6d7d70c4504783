"""Functions that the benchmark runs in vLLM's workers, on every rank."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch

from mlra_kernels.benchmarks.timing import Launch, gpu_launches

_REPLAY = torch.cuda.CUDAGraph.replay
_PARTS = ("execute_model", "sample_tokens")
"""What a model runner does for a step: up to the hidden states, then sampling."""
_COLLECTIVES = ("reduce_1stage", "reduce_2stage", "all_reduce", "allreduce", "nccl", "multimem")
"""Lower-case parts of the names of kernels that sum over ranks."""
_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
_host: list[float] = []
_profiles: dict[str, Any] = {}


def fill_cache(worker: Any, seed: int) -> None:
    """Fill the whole cache with random numbers, instead of a prefill."""
    torch.manual_seed(seed)
    for layer in _layers(worker):
        cache = layer.kv_cache
        if not getattr(layer, "fp8", False):
            cache.normal_()
            continue
        rows, scales = layer.cache_views(cache)
        # Bytes below 0x78 are finite in e4m3. The RoPE key after them is bfloat16.
        rows.view(torch.uint8).random_(0, 0x78)
        key = rows.view(torch.uint8)[..., -2 * layer.rope_dim :].view(torch.bfloat16)
        key.copy_(torch.randn(key.shape, device=key.device))
        scales.fill_(1 / 64)


def facts(worker: Any) -> dict[str, Any]:
    """The cache, the graphs and the attention of this rank."""
    runner = worker.model_runner
    config = runner.kv_cache_config
    layers = _layers(worker)
    page_bytes = tokens = 0
    for group in config.kv_cache_groups:
        page_bytes += len(group.layer_names) * group.kv_cache_spec.page_size_bytes
        tokens = group.kv_cache_spec.block_size
    manager = getattr(runner, "cudagraph_manager", None)
    mode = getattr(manager, "cudagraph_mode", None)
    if mode is None:
        mode = runner.vllm_config.compilation_config.cudagraph_mode
    found = {
        "runner": f"{type(runner).__module__}.{type(runner).__name__}",
        "graphs": mode.name,
        "attention": layers[0].get_attn_backend().get_name(),
        "block_size": tokens,
        "cache_tokens": config.num_blocks * tokens,
        "cache_bytes_per_token": page_bytes // tokens,
        "tokens_per_gib": (1 << 30) * tokens // page_bytes,
        "all_reduce": _all_reduce(runner.vllm_config.model_config.get_hidden_size()),
        "gpu": torch.cuda.get_device_name(),
    }
    if found["attention"].startswith("FLASH_ATTN"):
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        found["flash_attention"] = get_flash_attn_version()
    return found


def _all_reduce(hidden: int) -> str | None:
    """How vLLM sums one token's `[1, hidden]` over ranks; None for one rank."""
    from vllm.distributed.parallel_state import get_tp_group

    if get_tp_group().world_size == 1:
        return None
    told = get_tp_group().device_communicator
    row = torch.empty(1, hidden, dtype=torch.bfloat16, device="cuda")
    own = getattr(told, "ca_comm", None)
    if own is not None and own.should_custom_ar(row):
        return "vLLM's custom kernel"
    symmetric = getattr(told, "symm_mem_comm", None)
    if symmetric is not None and symmetric.should_use_symm_mem(row):
        return "symmetric memory"
    return "NCCL"


def time_graphs(worker: Any) -> None:
    """Start to time every step on the host, and every replay of a CUDA graph on the device."""
    _events.clear()
    _host.clear()

    def timed(graph: torch.cuda.CUDAGraph) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _REPLAY(graph)
        end.record()
        _events.append((start, end))

    torch.cuda.CUDAGraph.replay = timed
    for name in _PARTS:
        setattr(worker.model_runner, name, _on_host(getattr(worker.model_runner, name)))


def _on_host(run: Callable) -> Callable:
    """`run`, whose milliseconds are added to those of the current step."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return run(*args, **kwargs)
        finally:
            if run.__name__ == _PARTS[0]:
                _host.append(0.0)
            _host[-1] += 1e3 * (time.perf_counter() - start)

    return timed


def step_times(worker: Any) -> dict[str, list[float]]:
    """Stop timing; returns milliseconds since `time_graphs`: `graphs` of each replay, `host` of
    each step's Python."""
    torch.cuda.CUDAGraph.replay = _REPLAY
    _restore(worker)
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in _events]
    _events.clear()
    return {"graphs": times, "host": list(_host)}


def _restore(worker: Any) -> None:
    for name in _PARTS:
        vars(worker.model_runner).pop(name, None)


def profile_steps(worker: Any, kind: str, first: int, steps: int) -> None:
    """Profile the `kernels` or the `python` of `steps` steps, from number `first` on."""
    from torch.profiler import ProfilerActivity, profile

    run, calls = worker.model_runner.execute_model, count(1)
    if kind == "kernels":
        found = profile(activities=[ProfilerActivity.CUDA])
        start, stop = found.start, found.stop
    else:
        found = cProfile.Profile()
        start, stop = found.enable, found.disable
    _profiles.clear()
    _profiles.update(kind=kind, steps=steps, profile=found)

    def counted(*args: Any, **kwargs: Any) -> Any:
        call = next(calls)
        if call in (first, first + steps):
            torch.cuda.synchronize()
            try:
                (start if call == first else stop)()
            except Exception as error:  # a GPU that cannot be traced; the step still runs
                _profiles.setdefault("error", f"{type(error).__name__}: {error}")
        return run(*args, **kwargs)

    worker.model_runner.execute_model = counted


def profiled(worker: Any) -> Any:
    """What `profile_steps` has found, per step: see `_kernels` and `_functions`."""
    _restore(worker)
    if "error" in _profiles:
        return {"error": _profiles["error"]}
    found, steps = _profiles["profile"], _profiles["steps"]
    try:
        if _profiles["kind"] == "python":
            return _functions(found, steps)
        return kernels(gpu_launches(found), steps)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def kernels(events: list[Launch], steps: int) -> dict[str, Any]:
    """Microseconds per step.

    Args:
        events: name, start and duration in nanoseconds of each kernel and copy.

    Returns:
        `kernels`: (name, calls, us), the most first; `step_us`; `idle_us` in which nothing runs, in
        `gaps` pauses of 1 us and more; `all_reduce_us`, waiting for other ranks included.
    """
    events = sorted(events, key=lambda event: event[1])
    if not events:
        return {"error": "the profiler saw no kernel"}
    totals: dict[str, list[float]] = {}
    idle, gaps, busy_until = 0, 0, events[0][1]
    for name, start, duration in events:
        calls_and_us = totals.setdefault(name, [0, 0.0])
        calls_and_us[0] += 1
        calls_and_us[1] += duration / 1e3
        pause = start - busy_until
        idle, gaps = idle + max(pause, 0), gaps + (pause >= 1000)
        busy_until = max(busy_until, start + duration)
    rows = sorted(totals.items(), key=lambda row: -row[1][1])
    summed = [us for name, (_, us) in rows if any(part in name.lower() for part in _COLLECTIVES)]
    return {
        "kernels": [(name, calls / steps, us / steps) for name, (calls, us) in rows],
        "step_us": (busy_until - events[0][1]) / 1e3 / steps,
        "idle_us": idle / 1e3 / steps,
        "gaps": gaps / steps,
        "all_reduce_us": sum(summed) / steps,
    }


def _functions(found: cProfile.Profile, steps: int) -> list[tuple[str, float, float, float]]:
    """(function, calls, own us, us with all that it calls) per step, the longest first."""
    rows = []
    for (file, line, name), (_, calls, own, whole, _) in pstats.Stats(found).stats.items():
        place = "/".join(Path(file).parts[-2:])
        each = (calls / steps, 1e6 * own / steps, 1e6 * whole / steps)
        rows.append((f"{place}:{line} {name}", *each))
    return sorted(rows, key=lambda row: -row[3])[:60]


def peak_bytes(worker: Any) -> int:
    """The largest allocation on the device since the start."""
    return torch.cuda.max_memory_allocated()


def _layers(worker: Any) -> list[Any]:
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    context = worker.model_runner.vllm_config.compilation_config.static_forward_context
    return [layer for layer in context.values() if isinstance(layer, AttentionLayerBase)]
