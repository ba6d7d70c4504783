"""Functions that the benchmark runs in vLLM's workers, on every rank."""

from __future__ import annotations

from typing import Any

import torch

_REPLAY = torch.cuda.CUDAGraph.replay
_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []


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
        "gpu": torch.cuda.get_device_name(),
    }
    if found["attention"].startswith("FLASH_ATTN"):
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        found["flash_attention"] = get_flash_attn_version()
    return found


def time_graphs(worker: Any) -> None:
    """Start to time every replay of a CUDA graph on the device."""
    _events.clear()

    def timed(graph: torch.cuda.CUDAGraph) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _REPLAY(graph)
        end.record()
        _events.append((start, end))

    torch.cuda.CUDAGraph.replay = timed


def graph_times(worker: Any) -> list[float]:
    """Stop timing; returns the milliseconds of each replay since `time_graphs`."""
    torch.cuda.CUDAGraph.replay = _REPLAY
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in _events]
    _events.clear()
    return times


def peak_bytes(worker: Any) -> int:
    """The largest allocation on the device since the start."""
    return torch.cuda.max_memory_allocated()


def _layers(worker: Any) -> list[Any]:
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    context = worker.model_runner.vllm_config.compilation_config.static_forward_context
    return [layer for layer in context.values() if isinstance(layer, AttentionLayerBase)]
