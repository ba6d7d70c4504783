"""vLLM's own benchmark, `vllm bench throughput`, of models of 2.9 B parameters.

Weights are random and each model has its own process. The folders have a tokenizer, since vLLM's
benchmark writes its random prompts as text.

Usage: python -m mlra_vllm.benchmarks.throughput --models mlra4 gqa6 --requests 32 32K 256
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

from mlra_kernels.benchmarks.report import output_file
from mlra_vllm.benchmarks.shapes import SHAPES, write_shape, write_tokenizer
from mlra_vllm.benchmarks.steps import K, size

ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


VLLM = "--vllm"
"""The first argument of a process that runs vLLM's benchmark itself."""


def main() -> None:
    """Run every number of ranks and model; print a table and write the records."""
    if sys.argv[1:2] == [VLLM]:
        vllm_bench_throughput(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["mlra4", "mla", "gqa6"])
    parser.add_argument("--requests", nargs=3, type=size, default=(32, 32 * K, 256))
    parser.add_argument("--tp", nargs="+", type=int, default=[1], help="tensor parallel sizes")
    parser.add_argument("--json", type=output_file, help="where to write the records")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one model")
    args = parser.parse_args()
    records = []
    for tp in args.tp:
        for model in args.models:
            records.append(run(model, tp, *args.requests, args.timeout))
            print(table(records[-1:]), flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(records, indent=1))
    print(table(records))
    if failed := [record["model"] for record in records if "error" in record]:
        sys.exit(f"error: not measured: {', '.join(failed)}")


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
    """The record of one model."""
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
    """A Markdown table, one row per model."""
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
