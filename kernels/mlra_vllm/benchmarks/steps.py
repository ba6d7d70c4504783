"""Milliseconds of vLLM's decoding steps, cache size, time of a long prompt, throughput.

Models have 2.9 B parameters with random weights; each model and runner has its own process. A
decoding step is timed in three ways: from one token of all sequences to the next, with scheduler
and sampling; on the GPU, as one replay of the step's CUDA graph, without the output projection and
sampling, which vLLM keeps outside the graph; and on the host, as the time of a worker's Python. The
sequences' caches are not computed. They are declared to vLLM's prefix cache, and their pages hold
random numbers: times do not depend on the values. Every sequence has its own pages.

Usage: python -m mlra_vllm.benchmarks.steps --models mlra4 gqa6 --tp 1 2 --json FILE
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mlra_kernels.benchmarks.report import output_file, seconds, whole
from mlra_vllm.benchmarks import measure, workers
from mlra_vllm.benchmarks.shapes import SHAPES, misfit, write_shape
from mlra_vllm.benchmarks.tables import profile_table, table

K = 1024
ENVIRONMENT = {
    # Scheduler and prefix cache in this process, so that caches can be declared.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # The functions of workers.py are sent to vLLM's workers.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    # Otherwise graphs are captured twice, the first time to see how large they are.
    "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def size(text: str, least: int = 1) -> int:
    """An argparse type: a number of requests or tokens from `least` up, written 2048 or 2K."""
    found = re.fullmatch("([0-9]{1,10})([kK]?)", text, re.ASCII)
    value = int(found[1]) * (K if found[2] else 1) if found else -1
    if not least <= value < 2**31:
        said = f"{text:.60} is no number of requests or tokens; give {least} or up"
        raise argparse.ArgumentTypeError(said)
    return value


def case(text: str) -> tuple[int, int]:
    """An argparse type: (batch, context) of a text such as 32x8K."""
    batch, by, context = text.partition("x")
    if not by:
        said = f"{text:.60} is no batch and context such as 32x8K"
        raise argparse.ArgumentTypeError(said)
    return size(batch), size(context)


def main() -> None:
    """Run every runner, number of ranks and model; print a table and write the records."""
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
    parser.add_argument("--tp", nargs="+", type=whole(1), default=[1], help="tensor parallel sizes")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument(
        "--products", choices=("auto", "cublas"), default="auto", help="see mlra_vllm/products.py"
    )
    parser.add_argument(
        "--prompt", type=partial(size, least=0), default=0, help="tokens of a prompt to time"
    )
    parser.add_argument("--chunk", type=size, default=8 * K, help="tokens of a prompt's step")
    parser.add_argument(
        "--profile",
        type=case,
        metavar="BxN",
        help="also list kernels and Python functions of such a decoding step",
    )
    parser.add_argument(
        "--requests",
        nargs=3,
        type=size,
        metavar=("N", "IN", "OUT"),
        help="time N requests at once, IN tokens each, OUT new ones",
    )
    parser.add_argument("--json", type=output_file, help="where to write the records")
    parser.add_argument("--timeout", type=seconds, default=900, help="seconds for one model")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        model, tp, target = args.child
        run(model, int(tp), args, lambda record: Path(target).write_text(json.dumps(record)))
        return
    if said := misfit(args.models, args.tp):
        sys.exit(f"error: {said}")
    records = []
    for runner in args.runners:
        for tp in args.tp:
            for model in args.models:
                records.append(_child(model, runner, tp, args))
                print(table(records[-1:]), flush=True)
                if args.json:
                    Path(args.json).write_text(json.dumps(records, indent=1))
    for record in records:
        if "profile" in record:
            print(profile_table(record))
    print("ms a step (of it the graph, and a worker's Python)", table(records), sep="\n")
    if failed := [record["model"] for record in records if "error" in record]:
        sys.exit(f"error: not measured: {', '.join(failed)}")


def _child(model: str, runner: int, tp: int, args: argparse.Namespace) -> dict[str, Any]:
    """The record of one model, measured in its own process; what was measured before an error."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "record.json"
        command = [sys.executable, "-m", "mlra_vllm.benchmarks.steps", *sys.argv[1:]]
        env = ENVIRONMENT | os.environ | {"VLLM_USE_V2_MODEL_RUNNER": str(runner - 1)}
        record = {"model": model, "model_runner": runner, "tp": tp}
        error = None
        try:
            code = subprocess.run(
                [*command, "--child", model, str(tp), str(target)], env=env, timeout=args.timeout
            ).returncode
            if code or not target.exists():
                error = f"exit code {code}"
        except subprocess.TimeoutExpired:
            error = f"took more than {args.timeout:g} s"
        if target.exists():
            record |= json.loads(target.read_text())
        return record | ({"error": error} if error else {})


def run(
    model: str, tp: int, args: argparse.Namespace, save: Callable[[dict[str, Any]], None]
) -> None:
    """Measure one model in this process; every result is saved at once."""
    import vllm

    began = time.monotonic()
    folder = tempfile.TemporaryDirectory()
    llm = _engine(model, tp, args, Path(folder.name))
    facts = llm.collective_rpc(workers.facts)[0]
    record: dict[str, Any] = {
        "vllm": vllm.__version__,
        "started_s": round(time.monotonic() - began, 1),
        **facts,
        "kv_cache_dtype": args.kv_cache_dtype,
        "products": args.products,
        "steps": [],
    }
    print(json.dumps(record), flush=True)
    save(record)
    llm.collective_rpc(workers.fill_cache, args=(1,))
    for batch, context in args.contexts:
        step = {"batch": batch, "context": context}
        if batch * (context + 2 * facts["block_size"]) > facts["cache_tokens"]:
            step["error"] = f"the cache holds {facts['cache_tokens']} tokens"
        else:
            step |= measure.decoding(llm, batch, context)
        record["steps"].append(step)
        print(json.dumps(step), flush=True)
        save(record)
    if args.profile:
        record["profile"] = measure.profile(llm, *args.profile)
        save(record)
    if args.prompt:
        record["prompt"] = measure.prompt(llm, args.prompt, args.chunk)
        record["prompt"]["peak_bytes"] = llm.collective_rpc(workers.peak_bytes)[0]
        print(json.dumps(record["prompt"]), flush=True)
        save(record)
    if args.requests:
        record["throughput"] = measure.throughput(llm, *args.requests)
        print(json.dumps(record["throughput"]), flush=True)
        save(record)
    llm.llm_engine.engine_core.shutdown()


def _engine(model: str, tp: int, args: argparse.Namespace, folder: Path) -> Any:
    """vLLM with one model, for all that is asked."""
    import vllm

    cases = [*args.contexts, *([args.profile] if args.profile else ())]
    asked = args.requests or (0, 0, 0)
    longest = max([*(context for _, context in cases), args.prompt, asked[1] + asked[2]]) + K
    most = max([batch for batch, _ in cases] + [256 if args.requests else 1])
    captured = [n for n in (1, 2, 4, *range(8, 257, 8)) if n <= most]
    if not args.requests:
        captured = sorted({batch for batch, _ in cases} | {1})
    write_shape(model, folder, longest)
    return vllm.LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        seed=0,
        max_model_len=longest,
        max_num_seqs=most,
        max_num_batched_tokens=args.chunk,
        tensor_parallel_size=tp,
        kv_cache_dtype=args.kv_cache_dtype,
        additional_config={"products": args.products},
        enable_prefix_caching=True,
        compilation_config={"cudagraph_capture_sizes": captured},
        disable_log_stats=True,
    )


if __name__ == "__main__":
    main()
