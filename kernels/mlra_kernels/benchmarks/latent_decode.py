"""Measure latent decoding against the memory roof of the GPU.

`python -m mlra_kernels.benchmarks.latent_decode --suite all --json out.json --png out.png` prints
one line per shape and provider, writes JSON and a PNG, and ends with one JSON line. Every result is
compared with the fp32 reference first; a red comparison ends the run without a report.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time

import torch
import triton

from mlra_kernels.benchmarks.providers import PROVIDERS
from mlra_kernels.benchmarks.results import write_json
from mlra_kernels.benchmarks.timing import copy_roof, graph_microseconds, read_roof
from mlra_kernels.benchmarks.workload import Shape, Workload, make_workload
from mlra_kernels.latent_decode import latent_decode

K, M = 1 << 10, 1 << 20
ERROR_LIMIT = {False: 5e-3, True: 3e-2}  # relative, 16-bit cache and FP8 cache
LSE_LIMIT = 1e-2

RANK = "MLRA-4/TP4"  # one rank: 64 heads, one latent of 128 + 64
LENGTHS = [(1, 128 * K), (1, 256 * K), (1, 512 * K), (1, M), (1, 2 * M)]
BATCHES = [(128, K), (32, 8 * K), (128, 4 * K), (128, 16 * K)]
MLRA = {"num_latents": 4, "num_branches": 4}
SUITES = {
    "lengths": [Shape(RANK, b, n) for b, n in [(1, 32 * K), (1, 64 * K), *LENGTHS]],
    "batches": [Shape(RANK, b, n) for b, n in BATCHES],
    "fp8": [
        *(Shape(f"{RANK} fp8", 1, n, fp8=True) for n in (128 * K, 512 * K, M, 2 * M)),
        *(Shape("MLRA-4/TP1 fp8", 1, n, **MLRA, fp8=True) for n in (512 * K, M)),
    ],
    "latents": [Shape("MLRA-4/TP1", 1, n, **MLRA) for n in (256 * K, 512 * K, M)],
    "queries": [Shape(f"{RANK} q={q}", 1, n, q_len=q) for n in (128 * K, M) for q in (2, 4)],
    "models": [
        *(Shape("MLA", b, n, latent_dim=512) for b, n in LENGTHS + BATCHES),
        *(Shape("GLA-2/TP2", b, n, latent_dim=256, heads=32) for b, n in LENGTHS + BATCHES),
    ],
    "quick": [Shape(RANK, 1, 128 * K), Shape(RANK, 128, K), Shape("MLRA-4/TP1", 1, 32 * K, **MLRA)],
}
SUITES["all"] = [
    shape for name in ("lengths", "batches", "latents", "queries", "fp8", "models")
    for shape in SUITES[name]
]  # fmt: skip


def gate(workload: Workload, call, name: str) -> float:
    """Return a provider's relative error on the first block table; exit if it is too large."""
    w = workload
    want_out, want_lse = latent_decode(
        w.q_absorbed, w.q_rope, w.cache, w.tables[0], w.cache_seqlens, w.softmax_scale,
        num_branches=w.shape.num_branches, cache_scale=w.cache_scale, backend="torch",
    )  # fmt: skip
    out, lse = call()
    error = ((out.float() - want_out.float()).norm() / want_out.float().norm()).item()
    lse_error = 0.0 if lse is None else (lse - want_lse).abs().max().item()
    if not (error <= ERROR_LIMIT[w.shape.fp8] and lse_error <= LSE_LIMIT):
        sys.exit(
            f"RED: {name} on {w.shape.label}: relative error {error:.2e}, lse off by "
            f"{lse_error:.2e}: nothing is reported until it is right"
        )
    return error


def measure(shape: Shape, roof: float, seed: int, providers: list[str]) -> list[dict]:
    """Check and time every named provider that can run a shape; one record each."""
    workload = make_workload(shape, torch.bfloat16, "cuda", seed)
    records = []
    for name, fits, build in PROVIDERS:
        if name not in providers or not fits(workload):
            continue
        calls = build(workload)
        error = gate(workload, calls[0], name)
        us = graph_microseconds(calls)
        gbs = shape.cache_bytes / us / 1e3
        record = {
            "shape": shape.label, "provider": name, "batch": shape.batch, "length": shape.length,
            "model": shape.model, "fp8": shape.fp8, "us": round(us, 2), "gb_s": round(gbs, 1),
            "roof_us": round(shape.cache_bytes / roof * 1e6, 2),
            "share": round(gbs * 1e9 / roof, 4),
            "tflop_s": round(shape.flops / us / 1e6, 1), "error": error,
        }  # fmt: skip
        records.append(record)
        print(
            f"{shape.label:26} {name:22} {us:9.1f} us {gbs:8.0f} GB/s "
            f"{100 * record['share']:6.1f} % of {record['roof_us']:7.1f} us  error {error:.1e}",
            flush=True,
        )
    return records


def plot(records: list[dict], roof: float, path: str) -> None:
    """Draw latency over context length, batch 1, log-log, with the roof of the one-latent rank."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        sys.exit("--png needs matplotlib: pip install matplotlib, or leave --png out")
    plt.switch_backend("agg")
    figure, axes = plt.subplots(figsize=(10, 5.5))
    series: dict[str, list[tuple[int, float]]] = {}
    for r in records:
        if r["batch"] == 1:
            name = f"{r['model']}, {r['provider']}"
            series.setdefault(name, []).append((r["length"], r["us"]))
    colours = plt.get_cmap("tab20").colors
    for (name, points), colour in zip(series.items(), itertools.cycle(colours), strict=False):
        xs, ys = zip(*sorted(points), strict=True)
        axes.loglog(xs, ys, marker="o", color=colour, label=name)
    xs = sorted({r["length"] for r in records if r["batch"] == 1})
    row_bytes = Shape(RANK, 1, 1).row_bytes
    roof_label = f"roof: {row_bytes} bytes a token at {roof / 1e9:.0f} GB/s"
    axes.loglog(xs, [n * row_bytes / roof * 1e6 for n in xs], "k--", label=roof_label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens in the cache, batch 1")
    axes.set_ylabel("microseconds a call")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def commit() -> str:
    """Return the commit of the working tree, or "unknown" outside a repository."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Parse the command line, measure the suites, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--suite", nargs="+", choices=sorted(SUITES), default=["quick"])
    names = [name for name, _, _ in PROVIDERS]
    parser.add_argument("--providers", nargs="+", choices=names, default=names)
    parser.add_argument("--json", help="where to write the records")
    parser.add_argument("--png", help="where to draw latency over context length")
    parser.add_argument("--commit", default=None, help="commit to name in the report")
    parser.add_argument("--seed", type=int, default=None, help="seed of the inputs; default: clock")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU, and torch sees none")
    seed = args.seed if args.seed is not None else time.time_ns() % 2**31
    roof = read_roof()
    about = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "commit": args.commit or commit(), "seed": seed,
        "read_gb_s": round(roof / 1e9, 1), "copy_gb_s": round(copy_roof() / 1e9, 1),
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in about.items()), flush=True)
    records = []
    for shape in dict.fromkeys(shape for suite in args.suite for shape in SUITES[suite]):
        records += measure(shape, roof, seed, args.providers)
        torch.cuda.empty_cache()
    if args.png:
        plot(records, roof, args.png)
    report = {**about, "records": records}
    if args.json:
        write_json(args.json, report)
    print(json.dumps({**about, "us": {f"{r['shape']}|{r['provider']}": r["us"] for r in records}}))


if __name__ == "__main__":
    main()
