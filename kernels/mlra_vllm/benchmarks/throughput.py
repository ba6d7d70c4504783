"""vLLM's own benchmark, `vllm bench throughput`, of models of 2.9 B parameters.

Weights are random and each model and workload has its own process. The folders have a tokenizer,
since vLLM's benchmark writes its random prompts as text.

Usage: python -m mlra_vllm.benchmarks.throughput --models mlra4 gqa6 --requests 1000 1K 256
           --requests 32 32K 256 --json FILE.json --png FILE.png
       python -m mlra_vllm.benchmarks.throughput --draw FILE.json --png FILE.png
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mlra_kernels.benchmarks.report import commit, output_file, seconds, whole, write_json
from mlra_vllm.benchmarks import throughput_plot
from mlra_vllm.benchmarks.shapes import SHAPES, misfit, write_shape, write_tokenizer
from mlra_vllm.benchmarks.steps import K, size

ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


WORKLOADS = [(1000, 1 * K, 256), (32, 32 * K, 256)]
"""Requests at once, tokens of each, and new tokens of each."""

VLLM = "--vllm"
"""The first argument of a process that runs vLLM's benchmark itself."""


def main() -> None:
    """Run every number of ranks, workload and model; print a table, write the records, draw."""
    if sys.argv[1:2] == [VLLM]:
        vllm_bench_throughput(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["mlra4", "mla", "gqa6"])
    parser.add_argument(
        "--requests",
        nargs=3,
        type=size,
        action="append",
        metavar=("N", "IN", "OUT"),
        help="N requests at once, IN tokens each, OUT new ones; may be repeated (default: "
        + " and ".join(" ".join(map(str, workload)) for workload in WORKLOADS)
        + ")",
    )
    parser.add_argument("--tp", nargs="+", type=whole(1), default=[1], help="tensor parallel sizes")
    parser.add_argument("--json", type=output_file, help="where to write the records")
    parser.add_argument("--png", type=output_file, help="where to draw new tokens per second")
    parser.add_argument("--draw", metavar="FILE", help="draw this file of --json, measure nothing")
    parser.add_argument("--timeout", type=seconds, default=300, help="seconds for one model")
    args = parser.parse_args()
    if args.png and not importlib.util.find_spec("matplotlib"):
        sys.exit("error: --png needs matplotlib: pip install matplotlib, or leave --png out")
    if args.draw:
        if not args.png:
            sys.exit(f"error: --draw {args.draw} needs a picture's name: add --png FILE.png")
        try:
            throughput_plot.plot(*throughput_plot.read(Path(args.draw)), Path(args.png))
        except ValueError as error:
            sys.exit(f"error: {error}")
        return
    if said := misfit(args.models, args.tp):
        sys.exit(f"error: {said}")
    records = []
    for tp, workload, model in itertools.product(args.tp, args.requests or WORKLOADS, args.models):
        records.append(run(model, tp, *workload, args.timeout))
        print(table(records[-1:]), flush=True)
        if args.json:
            write_json(args.json, records)
    print(table(records))
    failed = [f"{r['model']} {r['requests']} {r['in']} {r['out']}" for r in records if "error" in r]
    if args.png and len(failed) < len(records):
        throughput_plot.plot(records, about(), Path(args.png))
    if failed:
        sys.exit(f"error: not measured: {', '.join(failed)}")


def about() -> dict[str, Any]:
    """GPU, versions and commit, once the processes that measure have left the GPU."""
    found = {"vllm": metadata.version("vllm"), "torch": torch.__version__, "commit": commit()}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def command(folder: Path, tp: int, requests: int, given: int, new: int) -> list[str]:
    """vLLM's command for a folder: `requests` of `given` tokens at once, and `new` tokens each."""
    options: dict[str, Any] = {
        "model": folder,
        "load-format": "dummy",
        "tensor-parallel-size": tp,
        "max-model-len": given + new + K,
        # Enough for the batch, so that no graph is captured in vain.
        "max-num-seqs": min(requests, 256),
        "max-num-batched-tokens": 8 * K,
        "dataset-name": "random",
        "random-input-len": given,
        "random-output-len": new,
        "num-prompts": requests,
        "num-warmups": 1,
        "output-json": folder / "result.json",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "mlra_vllm.benchmarks.throughput", VLLM, *flags]


def vllm_bench_throughput(flags: list[str]) -> None:
    """What `vllm bench throughput` runs, without the imports of vLLM's other commands."""
    if importlib.util.find_spec("uvloop") is None:
        # Imported at the top, used with --async-engine alone.
        sys.modules["uvloop"] = types.ModuleType("uvloop")
    from vllm.benchmarks import throughput
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    throughput.add_cli_args(parser)
    throughput.main(parser.parse_args(flags))


def run(model: str, tp: int, requests: int, given: int, new: int, timeout: float) -> dict[str, Any]:
    """The record of one model and workload."""
    record = {"model": model, "tp": tp, "requests": requests, "in": given, "out": new}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shape(model, folder, given + new + K)
        write_tokenizer(folder)
        try:
            code = subprocess.run(
                command(folder, tp, requests, given, new),
                env=ENVIRONMENT | os.environ,
                timeout=timeout,
            ).returncode
        except subprocess.TimeoutExpired:
            return record | {"error": f"took more than {timeout:g} s"}
        if code or not (folder / "result.json").exists():
            return record | {"error": f"exit code {code}"}
        told = json.loads((folder / "result.json").read_text())
    seconds = told["elapsed_time"]
    return record | {
        "seconds": seconds,
        "requests_per_s": told["requests_per_second"],
        "tokens_per_s": told["tokens_per_second"],
        "new_tokens_per_s": requests * new / seconds,
        "with_start_s": round(time.monotonic() - began, 1),
    }


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table, one row per record."""
    lines = [
        "| model, tp | requests | in | out | seconds | requests/s | new tokens/s | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        cells = f"| {r['model']}, {r['tp']} | {r['requests']} | {r['in']} | {r['out']} |"
        if "error" in r:
            lines.append(f"{cells} {r['error']} |")
            continue
        lines.append(
            f"{cells} {r['seconds']:.1f} | {r['requests_per_s']:.2f} |"
            f" {r['new_tokens_per_s']:.0f} | {r['tokens_per_s']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
