"""Draw the committed figures from the committed results: `python docs/figures/draw.py`.

results.png of README.md, serving.png and throughput.png of docs/serving.md and the PNG beside each
result file in docs/results and kernels/mlra_kernels/results; architecture.svg from the "May import"
lines of the packages' docstrings. Those of the evidence are drawn by examples/reproduce/report.py.
Needs matplotlib (pip install -e ".[dev]").
"""

import ast
import re
import sys
from pathlib import Path

from megatron_mlra.benchmarks import losses_files, losses_plot
from megatron_mlra.benchmarks.decoding.plot import plot as plot_decoding
from megatron_mlra.benchmarks.training.plot import plot as plot_training
from megatron_mlra.command_line import figures
from mlra_kernels.benchmarks.latent_decode import plot as plot_kernel
from mlra_vllm.benchmarks.throughput_plot import plot as plot_throughput

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "examples" / "measure"))
import measured  # noqa: E402
import serving_tables  # noqa: E402
from serving_tables import SERVED  # noqa: E402

RESULTS = ROOT / "docs" / "results"
COLOURS = figures.colours(("MLRA-4", "MLA", "GQA-8"))
K = 1024


def results(path: Path) -> None:
    """Decoding of one TP4 rank's share, and training, against MLA and GQA: 1,200 x 700 pixels."""
    sources = measured.newest("decoding"), measured.newest("training")
    decoding, training = (source.told for source in sources)
    figure, axes = figures.pyplot().subplots(1, 3, figsize=figures.SIZE, width_ratios=(1.15, 1, 1))
    _one_sequence(axes[0], decoding["records"])
    _many_sequences(axes[1], decoding["records"])
    _training(axes[2], training["rows"])
    for ax in axes:
        ax.grid(visible=False)
    ours, mla = (_time(decoding["records"], name, 1, 512) for name in ("MLRA-4", "MLA"))
    short, long = (
        _rate(training["rows"], "mlra4", s) / _rate(training["rows"], "stock-mla", s)
        for s in (2 * K, 8 * K)
    )
    figures.title(
        figure,
        f"MLRA-4 decodes 512K tokens {mla / ours:.1f}x as fast as MLA on a TP4 share (without its"
        f" collectives)\nand trains {1 - short:.0%} (2K) to {1 - long:.0%} (8K) slower",
    )
    said = [
        f"{each.gpu}, commit {each.told['commit']}, {each.date[:10]}"
        f" ({each.path.relative_to(ROOT)})"
        for each in sources
    ]
    source = (
        f"2.9B shape, bf16, all in the same code. {decoding.get('note', '')}\n"
        f"Decoding: one TP4 rank's share without collectives, {said[0]}.\n"
        f"Training: a cut of {training['num_layers']} layers, {said[1]}; MLA is Megatron's own; GQA"
        " not measured."
    )
    figure.text(0.012, 0.015, source, fontsize=8.5, color="#444444")
    figure.tight_layout(rect=(0, 0.08, 1, 0.99), w_pad=2.5)
    figures.save(figure, path)


def _rate(rows: list[dict], case: str, length: int) -> float:
    """Tokens per second of training in bf16."""
    return next(r["tokens_per_second"] for r in rows if r["case"] == f"{case}/bf16/auto/{length}")


def _time(records: list[dict], name: str, batch: int, context: int) -> float | None:
    """Milliseconds per token of a TP4 rank's share; None where the cache does not fit."""
    wanted = (f"{name} 1/4", batch, context * K)
    (found,) = (r for r in records if (r["label"], r["batch"], r["context"]) == wanted)
    return found["us"] / 1e3 if "us" in found else None


def _one_sequence(ax, records: list[dict]) -> None:
    contexts = (4, 32, 128, 512)
    ends = {}
    for name, colour in COLOURS.items():
        times = [_time(records, name, 1, context) for context in contexts]
        ax.plot(range(4), times, marker="o", color=colour, linewidth=2.2)
        ends[name] = times[-1]
    top = 1.15 * max(ends.values())
    for name, lift in (("MLRA-4", 0.0), ("MLA", 0.02), ("GQA-8", -0.02)):
        place, text = ends[name] + lift * top, f" {name} {ends[name]:.1f}"
        ax.text(3.03, place, text, color=COLOURS[name], va="center", weight="bold")
    ax.set_xticks(range(4), [f"{context}K" for context in contexts])
    ax.set(xlim=(-0.2, 4.1), ylim=(0, top), xlabel="tokens of context")
    ax.set_title("Decoding 1 sequence\nms per token, lower is better", loc="left", fontsize=11)


def _many_sequences(ax, records: list[dict]) -> None:
    contexts = (4, 32, 128)
    times = {name: [_time(records, name, 32, context) for context in contexts] for name in COLOURS}
    top = 1.1 * max(time for row in times.values() for time in row if time)
    for i, (name, colour) in enumerate(COLOURS.items()):
        for j, time in enumerate(times[name]):
            x = j + 0.28 * (i - 1)
            ax.bar(x, time or 0, 0.26, color=colour)
            said, turn = (f"{time:.1f}", 0) if time else (f"{name}: does not fit", 90)
            place = (time or 0) + 0.01 * top
            ax.text(x, place, said, ha="center", color=colour, size=9.5, rotation=turn)
        if times[name][-1]:
            place = 2 + 0.28 * (i - 1), 0.02 * top
            ax.text(*place, name, ha="center", color="white", rotation=90, weight="bold")
    ax.set_xticks(range(3), [f"{context}K" for context in contexts])
    ax.set(ylim=(0, top), xlabel="tokens of context per sequence")
    ax.set_title("Decoding 32 sequences\nms per token, lower is better", loc="left", fontsize=11)


def _training(ax, rows: list[dict]) -> None:
    lengths = (2048, 4096, 8192)
    for i, (name, case) in enumerate((("MLRA-4", "mlra4"), ("MLA", "stock-mla"))):
        for j, length in enumerate(lengths):
            x, rate = j + 0.38 * (i - 0.5), _rate(rows, case, length) / 1e3
            ax.bar(x, rate, 0.36, color=COLOURS[name])
            ax.text(x, rate + 1, f"{rate:.0f}", ha="center", color=COLOURS[name], size=9.5)
            ax.text(x, 2, name, ha="center", color="white", rotation=90, weight="bold")
    ax.set_xticks(range(3), [f"{length // K}K" for length in lengths])
    ax.set(ylim=(0, 100), xlabel="tokens per sequence")
    ax.set_title("Training\n1,000 tokens/s, higher is better", loc="left", fontsize=11)


GPUS = {1: "one GPU", 2: "two GPUs", 4: "four GPUs", 8: "eight GPUs"}


def serving(path: Path) -> None:
    """Decoding steps in vLLM over the number of ranks, each model's newest."""
    newest = serving_tables.served().items()
    found = {key: each for key, each in newest if key[2:] == serving_tables.DEFAULT}
    plain = [record for _, record in found.values()]
    figure, (axes,) = figures.sheet(1, 2)
    _serving_steps(axes[0], plain, 32, 32)
    _serving_steps(axes[1], plain, 1, 512)
    patch = figures.pyplot().Rectangle
    figures.legend_below(
        figure, [patch((0, 0), 1, 1, color=figures.colour(n), label=n) for n in SERVED.values()]
    )
    ranks = max(r["tp"] for r in plain)
    ours, mla = (_served_ms(plain, model, ranks, 32, 32) for model in ("mlra4", "mla"))
    told = [source.told for source, _ in found.values()]
    commits, gpus, versions = (
        ", ".join(dict.fromkeys(each[key] for each in told)) for key in ("commit", "gpu", "vllm")
    )
    figures.title(
        figure,
        f"In vLLM on {GPUS[ranks]} MLRA-4 decodes 32 x 32K tokens {mla / ours:.1f}x as fast as MLA",
        f"2.9B shapes, bf16, random weights, vLLM {versions}, {gpus}, commits {commits}",
    )
    figures.save(figure, path)


def _served_ms(records: list[dict], model: str, ranks: int, batch: int, context: int):
    """Milliseconds of a step around `context` K tokens; None if not measured."""
    steps = (s for r in records if (r["model"], r["tp"]) == (model, ranks) for s in r["steps"])
    wanted = (batch, context * K)
    return next((s.get("ms") for s in steps if (s["batch"], s["context"]) == wanted), None)


def _serving_steps(ax, records: list[dict], batch: int, context: int) -> None:
    times = {
        (model, ranks): ms
        for model in SERVED
        for ranks in GPUS
        if (ms := _served_ms(records, model, ranks, batch, context)) is not None
    }
    places = sorted({ranks for _, ranks in times})
    for (model, ranks), ms in times.items():
        x = places.index(ranks) + 0.21 * (list(SERVED).index(model) - 1.5)
        colour = figures.colour(SERVED[model])
        ax.bar(x, ms, 0.2, color=colour)
        ax.text(x, ms, f"{ms:.1f}", ha="center", va="bottom", color=colour, size=9)
    ax.set_xticks(range(len(places)), [f"{n} GPU" + "s" * (n > 1) for n in places])
    ax.set_title(f"ms per decoding step, {batch} x {context}K tokens\nlower is better")
    ax.grid(visible=False)


def throughput(path: Path) -> None:
    """New tokens per second in vLLM: of each workload, the newest result."""
    found = serving_tables.throughput()
    commits = " and ".join(dict.fromkeys(source.told["commit"] for source, _ in found))
    plot_throughput([record for _, record in found], found[-1][0].told | {"commit": commits}, path)


def benchmarks() -> None:
    """The PNG beside each result file of the benchmarks."""
    for file in sorted(RESULTS.glob("*_losses.json")):
        losses_plot.plot(losses_files.read_json(file), 50, file.with_suffix(".png"))
    drawn = {
        "training": lambda told, source, path: plot_training(told["rows"], path, source),
        "decoding": lambda told, source, path: plot_decoding(told["records"], source, path),
        "latent_decode": lambda told, source, path: plot_kernel(
            told["records"], 1e9 * told["read_gb_s"], source, str(path)
        ),
    }
    for result in measured.results():
        file = result.path.with_suffix(".png")
        if result.piece in drawn:
            drawn[result.piece](result.told, f"{result.gpu}, commit {result.told['commit']}", file)


def packages() -> dict[str, tuple[str, set[str]]]:
    """Name of each package -> (what its docstring says it is, the packages it may import)."""
    found = {}
    for path in sorted((ROOT / "megatron_mlra").glob("*/__init__.py")):
        doc = ast.get_docstring(ast.parse(path.read_text()))
        said = re.search(r"^May import:(.*?)^Imported by:", doc, re.S | re.M)[1]
        words = {word.split(".")[0] for word in re.findall(r"[\w.]+", said.partition(";")[0])}
        found[path.parent.name] = (doc.splitlines()[0], words)
    found["mlra_kernels"] = ("Kernels: decoding and training, torch and Triton only.", set())
    return {name: (doc, words & found.keys() - {name}) for name, (doc, words) in found.items()}


def architecture(path: Path) -> None:
    """The packages in rows, each above all that it imports; arrows that others imply are left
    out."""
    graph = {name: uses for name, (_, uses) in packages().items()}

    def reach(name: str) -> set[str]:
        return graph[name].union(*map(reach, graph[name]))

    def depth(name: str) -> int:
        return 1 + max(map(depth, graph[name]), default=-1)

    arrows = {
        (name, use)
        for name, uses in graph.items()
        for use in uses
        if not any(use in reach(other) for other in uses - {use})
    }
    rows: dict[int, list[str]] = {}
    for name in sorted(graph):
        rows.setdefault(depth(name), []).append(name)
    width, step, box = 1000, 92, (138, 40)
    height = step * len(rows)
    at: dict[str, tuple[float, float]] = {}
    for level, names in sorted(rows.items()):
        # Each package near the middle of what it imports.
        middle = {n: sum(at[u][0] for u in graph[n]) / len(graph[n]) if level else 0 for n in names}
        for i, name in enumerate(sorted(names, key=lambda n: (middle[n], n))):
            x = width * (i + 0.5) / len(names)
            at[name] = (x, height - step * (level + 0.5))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="15">',
        '<defs><marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8"'
        ' orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#888"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for name, use in sorted(arrows):
        (x, y), (u, v) = at[name], at[use]
        lines.append(
            f'<line x1="{x:.0f}" y1="{y + box[1] / 2:.0f}" x2="{u:.0f}" y2="{v - box[1] / 2:.0f}"'
            ' stroke="#888" marker-end="url(#a)"/>'
        )
    for name, (x, y) in sorted(at.items()):
        lines.append(
            f'<rect x="{x - box[0] / 2:.0f}" y="{y - box[1] / 2:.0f}" width="{box[0]}"'
            f' height="{box[1]}" rx="6" fill="#e8f1f8" stroke="#0b6fb8"/>'
            f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle">{name}</text>'
        )
    path.write_text("\n".join([*lines, "</svg>", ""]))


if __name__ == "__main__":
    architecture(HERE / "architecture.svg")
    results(HERE / "results.png")
    serving(HERE / "serving.png")
    throughput(HERE / "throughput.png")
    benchmarks()
