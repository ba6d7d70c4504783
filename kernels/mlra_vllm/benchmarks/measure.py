"""Measurements of one model in vLLM, in a process of its own."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from mlra_vllm.benchmarks import workers

STEPS, WARM = 48, 8
"""Timed steps, and steps before them."""


def _tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(50000), k=count)


def _greedy(new: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)


def generate(llm: Any, batch: int, context: int) -> dict[str, Any]:
    """Decode `batch` sequences around `context` tokens, whose caches are not computed.

    Returns:
        `times`, seconds at the end of each timed step; `steps`, the number of all steps; `cached`,
        the fewest tokens of a sequence that were declared.
    """
    prompts = [_tokens(context - WARM - STEPS // 2, seed) for seed in range(batch)]
    _declare_cached(llm, prompts)
    engine, params = llm.llm_engine, _greedy(WARM + STEPS + WARM)
    for i, tokens in enumerate(prompts):
        engine.add_request(f"{context}-{i}", {"prompt_token_ids": tokens}, params)
    counts, cached = dict.fromkeys(range(batch), 0), []
    times, steps = [], 0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        steps += bool(outputs)
        for output in outputs:
            counts[int(output.request_id.split("-")[1])] = len(output.outputs[0].token_ids)
            cached.append(output.num_cached_tokens)
        if outputs and min(counts.values()) >= WARM and len(times) <= STEPS:
            times.append(now)
    llm.reset_prefix_cache()
    return {"times": times, "steps": steps, "cached": min(cached)}


def decoding(llm: Any, batch: int, context: int) -> dict[str, Any]:
    """Time decoding steps of `batch` sequences around `context` tokens.

    Returns:
        ms, median_ms: from one token of all sequences to the next.
        graph_ms: the median replay of a step's graph on the rank that waited least for others.
        graph_ms_by_rank: the median replay of each rank, waiting included.
        host_ms_by_rank: the median time that a rank's Python spends on a step.
    """
    llm.collective_rpc(workers.time_graphs)
    found = generate(llm, batch, context)
    ranks = llm.collective_rpc(workers.step_times)
    gaps = [1e3 * (b - a) for a, b in pairwise(found["times"])]
    replays = [rank["graphs"][-STEPS:] for rank in ranks]
    return {
        "ms": statistics.mean(gaps),
        "median_ms": statistics.median(gaps),
        "graph_ms": _median([min(same) for same in zip(*replays, strict=False)]),
        "graph_ms_by_rank": [_median(rank) for rank in replays],
        "host_ms_by_rank": [_median(rank["host"][-STEPS:]) for rank in ranks],
        # About 1 if a decoding step is one graph, the number of layers if it is in pieces.
        "replays_per_step": round(len(ranks[0]["graphs"]) / found["steps"], 2),
        "cached_tokens": found["cached"],
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def profile(llm: Any, batch: int, context: int) -> dict[str, Any]:
    """The kernels and the Python functions of five decoding steps, by rank."""
    llm.collective_rpc(workers.profile_steps, args=("kernels", WARM + 16, 5))
    generate(llm, batch, context)
    kernels = llm.collective_rpc(workers.profiled)
    llm.collective_rpc(workers.profile_steps, args=("python", WARM + 16, 20))
    generate(llm, batch, context)
    python = llm.collective_rpc(workers.profiled)
    return {"batch": batch, "context": context, "kernels": kernels, "python": python[0]}


def _declare_cached(llm: Any, prompts: list[list[int]]) -> None:
    """Declare these prompts' pages to vLLM's prefix cache without computing them."""
    from vllm.v1.request import Request

    core = llm.llm_engine.engine_core.engine_core
    manager = core.scheduler.kv_cache_manager
    requests = [
        Request(f"declared-{i}", tokens, _greedy(1), None, block_hasher=core.request_block_hasher)
        for i, tokens in enumerate(prompts)
    ]
    for request in requests:
        if manager.allocate_slots(request, request.num_tokens) is None:
            raise RuntimeError("the cache is too small for these prompts")
    for request in requests:
        manager.free(request)


def prompt(llm: Any, tokens: int, chunk: int) -> dict[str, Any]:
    """Seconds until the first token after a prompt, with compiled kernels."""
    for seed, count in ((1, min(tokens, 2 * chunk + 999)), (2, tokens)):
        llm.reset_prefix_cache()
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": _tokens(count, seed)}], _greedy(1), use_tqdm=False)
        seconds = time.perf_counter() - start
    return {"tokens": tokens, "chunk": chunk, "seconds": seconds}


def throughput(llm: Any, count: int, given: int, new: int) -> dict[str, Any]:
    """Requests and tokens per second of `count` requests that arrive at once.

    Args:
        given, new: tokens of each prompt, and tokens generated for it.
    """
    prompts = [{"prompt_token_ids": _tokens(given, 1000 + i)} for i in range(count)]
    llm.generate(prompts[:8], _greedy(8), use_tqdm=False)
    llm.reset_prefix_cache()
    start = time.perf_counter()
    outputs = llm.generate(prompts, _greedy(new), use_tqdm=False)
    seconds = time.perf_counter() - start
    assert all(len(output.outputs[0].token_ids) == new for output in outputs)
    return {
        "requests": count,
        "in": given,
        "out": new,
        "seconds": seconds,
        "requests_per_s": count / seconds,
        "new_tokens_per_s": count * new / seconds,
        "tokens_per_s": count * (given + new) / seconds,
    }
