"""Milliseconds of vLLM's decoding steps, cache size, time of a long prompt, throughput.

Models have 2.9 B parameters with random weights; each model and runner has its own process. A
decoding step is timed in two ways: from one token of all sequences to the next, with scheduler and
sampling; and on the GPU, as one replay of the step's CUDA graph, without the output projection and
sampling, which vLLM keeps outside the graph. The sequences' caches are not computed. They are
declared to vLLM's prefix cache, and their pages hold random numbers: times do not depend on the
values. Every sequence has its own pages.

Usage: python -m mlra_vllm.benchmarks.steps --models mlra4 gqa6 --json FILE
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlra_kernels.benchmarks.report import output_file
from mlra_vllm.benchmarks import workers
from mlra_vllm.benchmarks.shapes import SHAPES, write_shape

K = 1024
STEPS, WARM = 48, 8
"""Timed steps, and steps before them."""
ENVIRONMENT = {
    # Scheduler and prefix cache in this process, so that caches can be declared.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # The functions of workers.py are sent to vLLM's workers.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def size(text: str) -> int:
    """A number of tokens, written 2048 or 2K."""
    return int(text[:-1]) * K if text[-1:] in "kK" else int(text)


def case(text: str) -> tuple[int, int]:
    """(batch, context) of a text such as 32x8K."""
    batch, _, context = text.partition("x")
    return int(batch), size(context)


def main() -> None:
    """Run every model and runner, print a table and write the records."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--contexts",
        nargs="*",
        type=case,
        default=[(1, 2 * K), (32, 2 * K), (32, 8 * K), (1, 128 * K), (32, 32 * K)],
        metavar="BxN",
        help="batch and context of decoding steps, such as 32x8K",
    )
    parser.add_argument("--runners", nargs="+", type=int, choices=(1, 2), default=[2])
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--prompt", type=size, default=0, help="tokens of a prompt to time")
    parser.add_argument("--chunk", type=size, default=8 * K, help="tokens of a prompt's step")
    parser.add_argument(
        "--requests",
        nargs=3,
        type=size,
        metavar=("N", "IN", "OUT"),
        help="time N requests at once, IN tokens each, OUT new ones",
    )
    parser.add_argument("--json", type=output_file, help="where to write the records")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one model")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        model, target = args.child
        Path(target).write_text(json.dumps(measure(model, args)))
        return
    records = []
    for runner in args.runners:
        for model in args.models:
            records.append(_child(model, runner, args))
            print(table(records[-1:]), flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(records, indent=1))
    print(table(records))
    if failed := [record["model"] for record in records if "error" in record]:
        sys.exit(f"error: not measured: {', '.join(failed)}")


def _child(model: str, runner: int, args: argparse.Namespace) -> dict[str, Any]:
    """The record of one model, measured in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "record.json"
        command = [sys.executable, "-m", "mlra_vllm.benchmarks.steps", *sys.argv[1:]]
        env = ENVIRONMENT | os.environ | {"VLLM_USE_V2_MODEL_RUNNER": str(runner - 1)}
        named = {"model": model, "model_runner": runner, "tp": args.tp}
        try:
            code = subprocess.run(
                [*command, "--child", model, str(target)], env=env, timeout=args.timeout
            ).returncode
        except subprocess.TimeoutExpired:
            return named | {"error": f"took more than {args.timeout:g} s"}
        if code or not target.exists():
            return named | {"error": f"exit code {code}"}
        return named | json.loads(target.read_text())


def measure(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one model in this process; returns its record."""
    import vllm

    contexts = [context for _, context in args.contexts]
    asked = args.requests or (0, 0, 0)
    longest = max([*contexts, args.prompt, asked[1] + asked[2]]) + K
    most = max([batch for batch, _ in args.contexts] + [256 if args.requests else 1])
    captured = [n for n in (1, 2, 4, *range(8, 257, 8)) if n <= most]
    if not args.requests:
        captured = sorted({batch for batch, _ in args.contexts} | {1})
    folder = tempfile.TemporaryDirectory()
    write_shape(model, Path(folder.name), longest)
    began = time.monotonic()
    llm = vllm.LLM(
        folder.name,
        load_format="dummy",
        skip_tokenizer_init=True,
        seed=0,
        max_model_len=longest,
        max_num_seqs=most,
        max_num_batched_tokens=args.chunk,
        tensor_parallel_size=args.tp,
        kv_cache_dtype=args.kv_cache_dtype,
        enable_prefix_caching=True,
        compilation_config={"cudagraph_capture_sizes": captured},
        disable_log_stats=True,
    )
    facts = llm.collective_rpc(workers.facts)[0]
    record = {
        "vllm": vllm.__version__,
        "started_s": round(time.monotonic() - began, 1),
        **facts,
        "kv_cache_dtype": args.kv_cache_dtype,
        "steps": [],
    }
    print(json.dumps(record), flush=True)
    llm.collective_rpc(workers.fill_cache, args=(1,))
    for batch, context in args.contexts:
        found = {"batch": batch, "context": context}
        if batch * (context + 2 * facts["block_size"]) > facts["cache_tokens"]:
            found["error"] = f"the cache holds {facts['cache_tokens']} tokens"
        else:
            found |= decoding(llm, batch, context)
        record["steps"].append(found)
        print(json.dumps(found), flush=True)
    if args.prompt:
        record["prompt"] = prompt(llm, args.prompt, args.chunk)
        record["prompt"]["peak_bytes"] = llm.collective_rpc(workers.peak_bytes)[0]
        print(json.dumps(record["prompt"]), flush=True)
    if args.requests:
        record["throughput"] = throughput(llm, *args.requests)
        print(json.dumps(record["throughput"]), flush=True)
    llm.llm_engine.engine_core.shutdown()
    return record


def _tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(50000), k=count)


def _greedy(new: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)


def decoding(llm: Any, batch: int, context: int) -> dict[str, Any]:
    """Time decoding steps of `batch` sequences around `context` tokens."""
    prompts = [_tokens(context - WARM - STEPS // 2, seed) for seed in range(batch)]
    _declare_cached(llm, prompts)
    engine, params = llm.llm_engine, _greedy(WARM + STEPS + WARM)
    for i, tokens in enumerate(prompts):
        engine.add_request(f"{context}-{i}", {"prompt_token_ids": tokens}, params)
    counts, cached = dict.fromkeys(range(batch), 0), []
    times, steps = [], 0
    llm.collective_rpc(workers.time_graphs)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        steps += bool(outputs)
        for output in outputs:
            counts[int(output.request_id.split("-")[1])] = len(output.outputs[0].token_ids)
            cached.append(output.num_cached_tokens)
        if outputs and min(counts.values()) >= WARM and len(times) <= STEPS:
            times.append(now)
    replays = llm.collective_rpc(workers.graph_times)[0]
    llm.reset_prefix_cache()
    gaps = [1e3 * (b - a) for a, b in pairwise(times)]
    return {
        "ms": statistics.mean(gaps),
        "median_ms": statistics.median(gaps),
        "graph_ms": statistics.median(replays[-STEPS:]) if replays else None,
        # About 1 if a decoding step is one graph, the number of layers if it is in pieces.
        "replays_per_step": round(len(replays) / steps, 2),
        "cached_tokens": min(cached),
    }


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


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table, one row per model."""
    cases = list(
        dict.fromkeys(
            (s["batch"], s["context"]) for record in records for s in record.get("steps", ())
        )
    )
    names = [f"{batch} x {context // K}K" for batch, context in cases]
    lines = [
        " | ".join(["| model, runner, tp", *names, "graphs", "tokens/GiB", "prompt s", "out/s |"]),
        "|---" * (len(names) + 5) + "|",
    ]
    for record in records:
        label = f"| {record['model']}, {record['model_runner']}, {record['tp']}"
        if "error" in record:
            lines.append(f"{label} | {record['error']} |")
            continue
        found = {(s["batch"], s["context"]): s for s in record["steps"]}
        cells = [label]
        for key in cases:
            step = found.get(key, {})
            graph = f" ({step['graph_ms']:.2f})" if step.get("graph_ms") else ""
            cells.append(f"{step['ms']:.2f}{graph}" if "ms" in step else step.get("error", ""))
        cells += [record["graphs"], f"{record['tokens_per_gib']:,}"]
        cells.append(f"{record['prompt']['seconds']:.2f}" if "prompt" in record else "")
        speed = record.get("throughput")
        cells.append(f"{speed['new_tokens_per_s']:.0f} |" if speed else " |")
        lines.append(" | ".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
