"""Draws the figures of the ladder. A mechanism has the same colour in all figures; a point is a
seed."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

from comparison import REFERENCE, Row, half_width
from megatron_mlra.command_line import figures as common

NAMES = {
    "mla": "MLA",
    "mla-gated": "MLA gated",
    "gla2": "GLA-2",
    "gla4": "GLA-4",
    "mlra2": "MLRA-2",
    "mlra4": "MLRA-4",
    "mlra4-gated": "MLRA-4 gated",
    "mlra4-unscaled": "MLRA-4 unscaled",
    "mha": "MHA",
    "gqa": "GQA",
    "gta": "GTA",
    "mfa": "MFA",
    "tpa": "TPA",
}
COLORS = {mechanism: common.COLOURS[name] for mechanism, name in NAMES.items()}


WINDOW = 10
"""Log lines over which a training loss is averaged."""


def finish(figure: Any, path: Path, mechanisms: list[str]) -> None:
    """Add a legend below the axes, where it covers no data, and write the file."""
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], color=COLORS[m], marker="o", linestyle="", label=NAMES[m])
        for m in mechanisms
    ]
    common.legend_below(figure, marks, 7)
    common.save(figure, path)


def pareto(rows: list[Row], timed: list[dict[str, Any]], path: Path, what: str) -> None:
    """Held-out loss over cost: over the KV cache's bytes per token and device at TP 1, 4 and 8, and
    over training time. Mechanisms of the same cost are drawn side by side. A dashed line joins the
    Pareto front: the mechanisms than which no other is both better and cheaper.

    Args:
        timed: the runs whose training speed may be taken.
        what: what the figure is of, for its title.
    """
    rows = [row for row in rows if row.results]
    columns = {f"TP{tp}": [kv_bytes(row, tp) for row in rows] for tp in (1, 4, 8)}
    device, times = training_minutes(rows, timed)
    columns |= {"training": times} if times else {}
    figure, axes = common.sheet(1, len(columns))
    losses = [row.mean() for row in rows]
    for panel, (name, values) in zip(axes[0], columns.items(), strict=True):
        places = [_beside(values, i) for i in range(len(rows))]
        for place, row in zip(places, rows, strict=True):
            _point(panel, place, row)
        if name == "training":
            panel.set_title("Training time")
            panel.set_xlabel(f"minutes on one {device}")
            panel.set_xlim(0.8 * min(values), 1.15 * max(values))
        else:
            panel.set_title(f"KV cache, {name}")
            _sizes(panel, values)
            panel.set_xlabel("KiB per token and device")
        front = front_of(list(zip(values, losses, strict=True)))
        xs = [*(places[i] for i in front), panel.get_xlim()[1]]
        ys = [*(losses[i] for i in front), losses[front[-1]]]
        panel.step(xs, ys, "--", where="post", color="#9a9a9a", zorder=1)
    axes[0][0].set_ylabel("held-out loss, nats per token (mean of the sets)")
    low = min(min(row.losses()) for row in rows)
    high = max(max(row.losses()) for row in rows)
    for panel in axes[0]:
        panel.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
    common.title(
        figure,
        f"{what}: {verdict(rows)}",
        "left and low is better; points: seeds; bars: 95 % intervals; dashed: the lowest mean at"
        " that cost or less",
    )
    finish(figure, path, [row.mechanism for row in rows])


def kv_bytes(row: Row, tp: int) -> float:
    """KV cache in bytes per token and device with `tp` tensor parallel ranks."""
    return row.results[0]["kv_bytes_per_token"][str(tp)]


def training_minutes(rows: list[Row], timed: list[dict[str, Any]]) -> tuple[str, list[float]]:
    """A device on which every mechanism was timed, and each mechanism's minutes per run there, by
    the median tokens per second. ('', []) where there is no such device."""
    speeds = [row.speeds(timed) for row in rows]
    shared = set.intersection(*map(set, speeds))
    if not shared:
        return "", []
    device = min(shared)
    return device, [
        row.results[0]["train_tokens"] / median(found[device]) / 60
        for row, found in zip(rows, speeds, strict=True)
    ]


def front_of(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto front, by rising first number: the points for which no other point is
    as low in both numbers and lower in one."""
    found: list[int] = []
    for i in sorted(range(len(points)), key=points.__getitem__):
        if not found or points[i][1] < points[found[-1]][1]:
            found.append(i)
    return found


def _point(panel: Any, x: float, row: Row) -> None:
    """Draw a mechanism's seeds, their mean and its 95 % interval at `x`."""
    losses, color = row.losses(), COLORS[row.mechanism]
    panel.plot([x] * len(losses), losses, "o", color=color, alpha=0.45)
    width = half_width(losses)
    error = None if math.isnan(width) else width
    panel.errorbar(x, row.mean(), yerr=error, fmt="_", markersize=16, capsize=4, color=color)


def _beside(values: list[float], i: int) -> float:
    """The x at which the i-th cost is drawn: shifted where other mechanisms have the same cost."""
    same = [j for j, value in enumerate(values) if value == values[i]]
    return values[i] * 1.045 ** (same.index(i) - (len(same) - 1) / 2)


def _sizes(panel: Any, values: list[float]) -> None:
    """Make the x axis logarithmic in KiB, with ticks at powers of two and, while there are at most
    six ticks, at halves or quarters between the powers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(values) / 1.25, max(values) * 1.25
    ticks: list[int] = []
    for parts in ((4,), (4, 6), (4, 5, 6, 7)):
        finer = [n * 2**k for k in range(5, 20) for n in parts if low <= n * 2**k <= high]
        ticks = finer if len(finer) <= 6 else ticks
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:.3g}"))
    panel.set_xlim(low, high)


def sweep(results: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss over the peak learning rate, a line per mechanism."""
    from ladder import mean_loss

    figure, ((panel,),) = common.sheet(1, 1)
    mechanisms = [m for m in NAMES if any(r["mechanism"] == m for r in results)]
    rates = sorted({r["peak_lr"] for r in results})
    for mechanism in mechanisms:
        found = sorted(
            (r["peak_lr"], mean_loss(r))
            for r in results
            if r["mechanism"] == mechanism and not r.get("diverged")
        )
        if found:
            panel.plot(*zip(*found, strict=True), "o-", color=COLORS[mechanism])
    panel.set_xscale("log")
    panel.set_xticks(rates, [f"{1e3 * rate:g}e-3" for rate in rates])
    panel.minorticks_off()
    panel.set(
        xlabel="peak learning rate", ylabel="held-out loss, nats per token, after half of the steps"
    )
    best = {
        m: min((mean_loss(r), r["peak_lr"]) for r in results if r["mechanism"] == m)
        for m in mechanisms
    }
    shared = sorted({f"{1e3 * rate:g}e-3" for loss, rate in best.values() if math.isfinite(loss)})
    common.title(figure, f"Sweep of the peak learning rate: best at {' or '.join(shared)}")
    finish(figure, path, mechanisms)


def curves(rows: list[Row], path: Path, what: str) -> None:
    """Training loss minus MLA's over steps, as the mean over seeds and over `WINDOW` log lines."""
    figure, ((panel,),) = common.sheet(1, 1)
    rows = [row for row in rows if row.results]
    reference = next((row for row in rows if row.mechanism == REFERENCE), rows[0])
    base = _curve(reference)
    for row in rows:
        curve = _curve(row)
        steps = sorted(set(curve) & set(base))
        gaps = [curve[s] - base[s] for s in steps]
        span = min(WINDOW, len(steps))
        smooth = [sum(gaps[i : i + span]) / span for i in range(len(gaps) - span + 1)]
        panel.plot(steps[span - 1 :], smooth, color=COLORS[row.mechanism])
    panel.set(
        xlabel="step", ylabel=f"training loss minus that of {NAMES[reference.mechanism]}, nats"
    )
    common.title(figure, f"{what}: {verdict(rows)}")
    finish(figure, path, [row.mechanism for row in rows])


def _curve(row: Row) -> dict[int, float]:
    """Step -> mean training loss over seeds."""
    found: dict[int, list[float]] = {}
    for result in row.results:
        for step, loss in result["losses"]:
            found.setdefault(step, []).append(loss)
    return {step: sum(losses) / len(losses) for step, losses in found.items()}


def verdict(rows: list[Row]) -> str:
    """A few words that name the mechanisms whose differences to MLA count."""
    reference = next((row for row in rows if row.mechanism == REFERENCE and row.results), None)
    if reference is None:
        return "MLA is not trained yet"
    if all(row.p is None for row in rows):
        return "no difference to MLA is tested yet"
    better = [NAMES[r.mechanism] for r in rows if r.counts and r.mean() < reference.mean()]
    worse = [NAMES[r.mechanism] for r in rows if r.counts and r.mean() > reference.mean()]
    if not better and not worse:
        return "no difference to MLA counts"
    parts = []
    if better:
        parts.append(f"better than MLA: {', '.join(better)}")
    if worse:
        parts.append(f"worse: {', '.join(worse)}")
    return "; ".join(parts)
