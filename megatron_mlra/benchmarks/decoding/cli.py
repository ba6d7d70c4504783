"""Measure time per output token on one GPU: MLRA against MLA and GQA, whole and one rank's share.

Random weights and a cache filled with random numbers: times do not depend on their values. A share
at tensor parallel size N is the work of one of N ranks without its collectives.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from megatron_mlra.benchmarks.decoding.measure import Case, gate, measure, measure_prefill
from megatron_mlra.benchmarks.decoding.plot import plot
from megatron_mlra.command_line.parser import OneLineParser, check_output, write_text
from megatron_mlra.description.presets import preset_description
from mlra_kernels.benchmarks.timing import read_roof

PRESETS = ("mlra4_2.9b", "mla_2.9b", "gqa_2.9b")
K = 1024


def cases(tps: list[int], presets: list[str]) -> list[Case]:
    """What is measured: every preset whole and as a share, the variations of the first one."""
    out = []
    for tp in tps:
        for preset in presets:
            model = preset_description(preset)
            label = model.variant
            if model.attention == "gqa":
                if model.num_query_groups % tp:
                    # Six key heads cannot be cut in four; eight are the usual choice.
                    model = model.replace(num_query_groups=8)
                label = f"GQA-{model.num_query_groups}"
            where = "whole" if tp == 1 else f"1/{tp}"
            out.append(Case(f"{label} {where}", model, tp))
            if model.attention == "mlra" and model.num_branches > 1:
                out.append(Case(f"{label} FP8 {where}", model, tp, cache_dtype="fp8"))
                if tp > 1:
                    out.append(Case(f"{label} sharded {where}", model, tp, weight_mode="sharded"))
    return out


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: microseconds, share of the roof and cache, by case, batch and context."""
    lines = [
        "| case | batch | context | us a step | roof us | share | weights GB | cache GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        sizes = f"{r['weight_bytes'] / 1e9:.2f} | {r['cache_bytes'] / 1e9:.2f}"
        timed = "does not fit | |"
        if "us" in r:
            timed = f"{r['us']:.0f} | {r['roof_us']:.0f} | {100 * r['share']:.0f} %"
        lines.append(f"| {r['label']} | {r['batch']} | {r['context'] // K}K | {timed} | {sizes} |")
    return "\n".join(lines)


def parser() -> OneLineParser:
    """The flags."""
    flags = OneLineParser(description=" ".join(__doc__.split()))
    add = flags.add_argument
    add(
        "--configs",
        nargs="+",
        default=list(PRESETS),
        metavar="PRESET",
        help=f"presets by name or path (default: {' '.join(PRESETS)})",
    )
    add("--tp", type=int, nargs="+", default=[4, 1], help="shares to measure (default: 4 1)")
    add(
        "--contexts",
        type=int,
        nargs="+",
        metavar="TOKENS",
        default=[4 * K, 32 * K, 128 * K, 512 * K],
        help="tokens in the cache (default: 4, 32, 128 and 512 K)",
    )
    add("--batches", type=int, nargs="+", default=[1, 32], help="sequences (default: 1 32)")
    add("--prefill", type=int, nargs="*", default=[], help="prompt lengths to time")
    add("--prefill-chunk", type=int, default=4096, help="tokens of a prefill step (default: 4096)")
    add("--json", metavar="FILE", help="where to write the records")
    add("--png", metavar="FILE", help="where to draw time over context")
    add("--commit", help="commit to name in the report")
    add("--seed", type=int, help="default: the clock")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Gate, measure, report."""
    args = parser().parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a CUDA GPU, and torch sees none")
    try:
        for flag, file in (("--json", args.json), ("--png", args.png)):
            if file:
                check_output(file, flag)
        todo = cases(args.tp, args.configs)
    except ValueError as error:
        sys.exit(f"error: {error}")
    seed = args.seed if args.seed is not None else time.time_ns() % 2**20
    roof = read_roof()
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    about = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "commit": args.commit or done.stdout.strip() or "unknown",
        "read_gb_s": round(roof / 1e9), "seed": seed,
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in about.items()), flush=True)
    records, prefills, failed = [], [], []
    for case in todo:
        start = time.monotonic()
        try:
            error = gate(case, seed)
            torch.cuda.empty_cache()
            found = measure(case, args.contexts, args.batches, roof, seed)
            records += [record | {"gate_error": error} for record in found]
            took = time.monotonic() - start
            print(f"{case.label}: error {error:.1e}, {took:.0f} s\n{table(found)}", flush=True)
            if case.weight_mode == "replicated" and case.cache_dtype == "auto":
                for length in args.prefill:
                    prefills.append(measure_prefill(case, length, args.prefill_chunk, seed))
                    print(json.dumps(prefills[-1]), flush=True)
        except (RuntimeError, ValueError) as problem:
            failed.append(case.label)
            print(f"error: {case.label}: {problem}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
        if args.json:
            report = {**about, "records": records, "prefills": prefills, "failed": failed}
            write_text(args.json, json.dumps(report, indent=1))
    if args.png and records:
        plot(records, f"{about['gpu']}, {about['commit']}", Path(args.png))
    if failed:
        sys.exit(f"error: not reported: {', '.join(failed)}")
