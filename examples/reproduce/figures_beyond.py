"""Draws the figures of the runs beyond the loss: accuracy at long contexts, and statistics of
attention per layer."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import figures
from megatron_mlra.command_line import figures as common
from megatron_mlra.evaluation.analysis.report import IDLE, costs, divergence_share, idle
from report_beyond import CHANCE, Beyond, lengths, tasks, variance_ratio


def long_contexts(rows: list[Beyond], path: Path, what: str) -> None:
    """Accuracy over context length, a panel per task."""
    sizes, names = lengths(rows), tasks(rows)
    figure, axes = common.sheet(2, (len(names) + 1) // 2)
    for panel, task in zip((p for line in axes for p in line), names, strict=False):
        for row in rows:
            values = [row.accuracy(size, task) for size in sizes]
            panel.plot(sizes, values, "o-", color=figures.COLORS[row.mechanism])
        panel.axhline(CHANCE, color="#9a9a9a", linestyle=":", linewidth=1)
        panel.set_xscale("log")
        common.token_ticks(panel.xaxis, sizes)
        panel.set_ylim(0, 1.03)
        panel.set_title(task.replace("_", " "))
    for line in axes:
        line[0].set_ylabel("right of four choices")
    for panel in axes[-1]:
        panel.set_xlabel("tokens of context")
    last = {row.name: row.accuracy(sizes[-1]) for row in rows}
    low, high = min(last, key=last.__getitem__), max(last, key=last.__getitem__)
    said = f"all mechanisms answer {last[low]:.0%} of all tasks right"
    if last[low] < last[high]:
        said = f"from {last[low]:.0%} ({low}) to {last[high]:.0%} ({high}) of all tasks are right"
    common.title(
        figure,
        f"{what}: at {common.tokens(sizes[-1])} tokens, {said}",
        f"dotted: chance, {CHANCE:.0%}; means over seeds",
    )
    figures.finish(figure, path, [row.mechanism for row in rows])


def why(rows: list[Beyond], path: Path, what: str) -> None:
    """Statistics of the latent mechanisms' attention over layers: variance of keys, entropy,
    divergence of branches, and loss without the cheapest branch."""
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in rows if row.is_latent()]
    figure, axes = common.sheet(2, 2)
    ((ratio, entropy), (likeness, ablation)) = axes
    for row in rows:
        colour = figures.COLORS[row.mechanism]

        def line(panel: Any, values: list[float], style: str = "o-", colour: str = colour) -> None:
            panel.plot(range(1, len(values) + 1), values, style, color=colour, markersize=4)

        line(ratio, row.layers(lambda x: variance_ratio(x, True)))
        line(ratio, row.layers(lambda x: variance_ratio(x, False)), "^--")
        line(entropy, row.layers(lambda x: fmean(x["entropy"])))
        line(ablation, row.layers(lambda x: min(cost["loss"] for cost in x["ablation"])))
        if row.runs[0]["beyond"]["analysis"]["branches"] > 1:
            line(likeness, row.layers(divergence_share))
    ratio.axhline(1, color="#9a9a9a", linestyle=":", linewidth=1)
    ratio.set_yscale("log")
    ratio.set_title("Variance of NoPE keys over RoPE keys (dashed: without calibration)")
    entropy.set_title("Entropy of attention rows, nats")
    common.from_zero(entropy)
    likeness.set_title("Divergence of the branches' rows, share of ln 2")
    likeness.set_ylim(0, 1)
    ablation.set_title("Loss more without the cheapest branch, nats per token")
    ablation.set_yscale("symlog", linthresh=IDLE)
    for panel in (p for each in axes for p in each):
        panel.set_xlabel("layer")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    parts = []
    for row in rows:
        found = [run["beyond"]["analysis"] for run in row.runs]
        count, total = sum(len(idle(x)) for x in found), sum(len(costs(x)) for x in found)
        parts.append(f"{row.name} {count} of {total}")
    common.title(figure, f"{what}: idle branches (cost below {IDLE}): {', '.join(parts)}")
    figures.finish(figure, path, [row.mechanism for row in rows])
