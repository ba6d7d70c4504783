"""Measure latent decoding, compared with the memory roof of the GPU and with other libraries.

`python -m mlra_kernels.benchmarks.latent_decode --suite all --json out.json --png out.png` prints
one line per shape and provider and a table, writes JSON and a PNG, and ends with one JSON line.
Every result is compared with the fp32 reference first. A wrong result of this project's kernels
ends the run without a report; a peer that fails or is wrong is left out, with the reason.
"""

import importlib.util
import sys
from typing import NoReturn

import torch

from mlra_kernels.benchmarks import providers, report
from mlra_kernels.benchmarks.providers import PROVIDERS, Provider
from mlra_kernels.benchmarks.timing import copy_roof, graph_microseconds, read_roof
from mlra_kernels.benchmarks.workload import Shape, Workload, make_workload
from mlra_kernels.latent_decode import latent_decode

K, M = 1 << 10, 1 << 20
ERROR_LIMIT = {False: 5e-3, True: 3e-2}
"""Whether the cache is FP8 -> largest relative error."""
LSE_LIMIT = 1e-2
"""Largest absolute error of a log-sum-exp."""

RANK = "MLRA-4/TP4"  # one rank: 64 heads, one latent of 128 + 64
LENGTHS = [(1, 128 * K), (1, 256 * K), (1, 512 * K), (1, M), (1, 2 * M)]
AMONG_PEERS = [(1, 128 * K), (1, 512 * K), (128, K), (32, 8 * K), (128, 4 * K)]
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
    "guesses": [
        Shape(f"{heads} heads q={q}{' fp8' * fp8}", 1, n, heads=heads, q_len=q, fp8=fp8)
        for fp8 in (False, True)
        for n in (128 * K, M)
        for heads in (24, 64)
        for q in (1, 2, 4, 8)
    ],
    "models": [
        *(Shape("MLA", b, n, latent_dim=512) for b, n in LENGTHS + BATCHES),
        *(Shape("GLA-2/TP2", b, n, latent_dim=256, heads=32) for b, n in LENGTHS + BATCHES),
    ],
    "peers": [Shape(RANK, b, n) for b, n in AMONG_PEERS],
    "peers-mla": [Shape("MLA", b, n, latent_dim=512) for b, n in AMONG_PEERS],
    "quick": [Shape(RANK, 1, 128 * K), Shape(RANK, 128, K), Shape("MLRA-4/TP1", 1, 32 * K, **MLRA)],
}
SUITES["all"] = [
    shape for name in ("lengths", "batches", "latents", "queries", "fp8", "models")
    for shape in SUITES[name]
]  # fmt: skip


def gate(workload: Workload, call, name: str) -> float:
    """A provider's relative error on the first block table. If it is large, the program exits, or,
    of another library, ArithmeticError says so."""
    w = workload
    want_out, want_lse = latent_decode(
        w.q_absorbed, w.q_rope, w.cache, w.tables[0], w.cache_seqlens, w.softmax_scale,
        num_branches=w.shape.num_branches, cache_scale=w.cache_scale, backend="torch",
    )  # fmt: skip
    out, lse = call()
    error = report.relative_error(out, want_out)
    lse_error = 0.0 if lse is None else (lse - want_lse).abs().max().item()
    if not (error <= ERROR_LIMIT[w.shape.fp8] and lse_error <= LSE_LIMIT):
        wrong(name, w.shape.label, f"relative error {error:.2e}, lse off by {lse_error:.2e}")
    return error


def wrong(name: str, label: str, off: str) -> NoReturn:
    """End the program for a wrong result of this project's kernels, raise for a peer's.

    Raises:
        ArithmeticError: the result is another library's, which is left out then.
    """
    if name == "mlra_kernels":
        report.red(f"{name} on {label}: {off}")
    raise ArithmeticError(f"wrong: {off}")


def timed(provider: Provider, workload, gate) -> tuple[float, float] | None:
    """(Microseconds of a call, relative error). If another library fails or is wrong: None, after
    printing the reason."""
    try:
        calls = provider.build(workload)
        error = gate(workload, calls[0], provider.name)
        return graph_microseconds(calls), error
    except Exception as problem:  # of a peer, whatever it is: a build, a driver, a wrong result
        if provider.name == "mlra_kernels":
            raise
        providers.left_out(workload.shape.label, provider, problem)
        return None


def measure(shape: Shape, roof: float, seed: int, able: list[Provider]) -> list[dict]:
    """Check and time every provider that can run a shape; returns one record per provider."""
    workload = make_workload(shape, torch.bfloat16, "cuda", seed)
    records = []
    for provider in able:
        name = provider.name
        found = timed(provider, workload, gate) if provider.fits(workload) else None
        if found is None:
            continue
        us, error = found
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


def table(records: list[dict]) -> str:
    """Markdown: microseconds of every shape, a column per provider, and the memory roof."""
    return report.table(
        "microseconds", [r | {"row": r["shape"], "cell": f"{r['us']:.1f}"} for r in records],
        {"roof": {r["shape"]: f"{r['roof_us']:.1f}" for r in records}},
    )  # fmt: skip


COLOURS = {"MLRA-4": "#0b6fb8", "MLA": "#c8501e", "GLA-2": "#2e8b3d"}
"""The colours of the whole project's figures."""

LINES = {"fp8": ("--", "s"), "q=2": (":", "^"), "q=4": ("-.", "v"), "TP1": ((0, (6, 2)), "D")}
"""Word in a shape's name -> line style and marker; other shapes have a solid line."""


def plot(records: list[dict], roof: float, source: str, path: str) -> None:
    """Draw latency over context length at batch 1, with the roof of a rank with one latent.

    Args:
        roof: bytes per second.
        source: GPU and commit.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator

    # Guesses on other numbers of heads would hide the lines of the models.
    mine = [r for r in records if r["batch"] == 1 and "heads" not in r["model"]]
    if not mine:
        print(f"{path} is not drawn: no record has one sequence", flush=True)
        return
    plt.switch_backend("agg")
    figure, axes = plt.subplots(figsize=(12, 7), layout="constrained")
    series: dict[str, list[tuple[int, float]]] = {}
    for r in mine:
        name = r["model"] if r["provider"] == "mlra_kernels" else f"{r['model']}, {r['provider']}"
        series.setdefault(name, []).append((r["length"], r["us"]))
    for name, points in series.items():
        line, marker = next((look for word, look in LINES.items() if word in name), ("-", "o"))
        if "," in name:
            marker = "x"
        colour = next((c for kind, c in COLOURS.items() if name.startswith(kind)), "#7a7a7a")
        face = "none" if "TP1" in name else colour
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(
            *(xs, ys), linestyle=line, marker=marker, color=colour, markerfacecolor=face,
            markersize=8, linewidth=2, label=name,
        )  # fmt: skip
    xs = sorted({r["length"] for r in mine})
    row_bytes = Shape(RANK, 1, 1).row_bytes
    roof_label = f"roof: {row_bytes} bytes per token at {roof / 1e9:.0f} GB/s"
    axes.plot(xs, [n * row_bytes / roof * 1e6 for n in xs], "k--", linewidth=1, label=roof_label)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache, batch 1")
    names = [f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}K" for n in xs]
    axes.xaxis.set_major_locator(FixedLocator(xs))
    axes.xaxis.set_major_formatter(FixedFormatter(names))
    axes.yaxis.set_major_locator(FixedLocator([a * 10**n for n in range(5) for a in (1, 2, 5)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:,.0f}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    us = [r["us"] for r in mine]
    axes.set_ylim(min(us) / 4, max(us) * 1.3)
    axes.set_title("microseconds a call", loc="left")
    axes.grid(True, alpha=0.3)
    ends = {r["model"]: r["us"] for r in mine if r["length"] == xs[-1]}
    said = ", ".join(
        f"{name} {time:.0f} us" for name, time in sorted(ends.items(), key=lambda e: e[1])
    )
    title = f"One sequence of {names[-1]} tokens: {said}\n({source})"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Parse the command line, measure the suites, report."""
    flags = report.parser(__doc__)
    flags.add_argument("--suite", nargs="+", choices=sorted(SUITES), default=["quick"])
    flags.add_argument("--png", type=report.output_file, help="where to draw latency over context")
    args, able = providers.parse(flags, PROVIDERS)
    if args.png and not importlib.util.find_spec("matplotlib"):
        sys.exit("error: --png needs matplotlib: pip install matplotlib, or leave --png out")
    roof = read_roof()
    roofs = {"read_gb_s": round(roof / 1e9, 1), "copy_gb_s": round(copy_roof() / 1e9, 1)}
    about = report.header(args, **roofs)
    shapes = dict.fromkeys(shape for suite in args.suite for shape in SUITES[suite])
    found = about | report.gathered(shapes, lambda s: measure(s, roof, args.seed, able))
    records = found["records"]
    print(table(records))

    def draw() -> None:
        if args.png:
            plot(records, roof, f"{about['gpu']}, commit {about['commit']}", args.png)

    times = {f"{r['shape']}|{r['provider']}": r["us"] for r in records}
    report.finish(args, found, {**about, "us": times}, draw)


if __name__ == "__main__":
    main()
