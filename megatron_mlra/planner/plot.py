"""The planner's report as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mlra.command_line import figures
from megatron_mlra.planner.memory import GIB
from megatron_mlra.planner.report import Report

HELD = ("weights", "gradients", "optimizer", "activations", "working")
SPENT = ("compute", "elementwise", "tensor", "context", "expert", "pipeline", "bubble")
SPENT += ("data", "optimizer")
PARTS = {
    "weights": "#3f6fae",
    "gradients": "#d9813a",
    "optimizer": "#7d5ba6",
    "activations": "#58a55c",
    "working": "#b9b04a",
    "compute": "#4a4a4a",
    "elementwise": "#9a9a9a",
    "tensor": "#c0504d",
    "context": "#e3a9a7",
    "expert": "#e0699f",
    "pipeline": "#2e9aa6",
    "bubble": "#a5d5da",
    "data": "#d8b13c",
}
"""Part of the memory or of a step -> colour."""


def draw(report: Report, path: Path) -> None:
    """Draw memory and time of the best layouts, and decoding floors over context, into a file.

    Raises:
        ValueError: matplotlib is not installed, or does not know the file's format.
    """
    try:
        plt = figures.pyplot()
    except ImportError:
        raise ValueError(f"--plot {path} needs matplotlib; pip install matplotlib") from None
    known = plt.figure().canvas.get_supported_filetypes()
    plt.close("all")
    if path.suffix.lstrip(".") not in known:
        raise ValueError(f"--plot {path}: use a name that ends in .png, .svg or .pdf")
    figure = plt.figure(figsize=figures.SIZE, dpi=figures.DPI, layout="constrained")
    panels = figure.subplot_mosaic([["memory", "decoding"], ["time", "decoding"]])
    labels = [f"{p.layout}\nmicro {p.layout.micro_batch}" for p in report.plans]
    held = {k: [getattr(p.memory, k) / GIB for p in report.plans] for k in HELD}
    _stack(panels["memory"], labels, held)
    room = report.gpu.memory_gb * 1e9 / GIB
    panels["memory"].axvline(room, color="black", linestyle=":")
    panels["memory"].set_title(f"GiB per GPU (dotted: the {room:.0f} that it has)")
    _stack(panels["time"], labels, {k: [getattr(p.step, k) for p in report.plans] for k in SPENT})
    panels["time"].set_title("seconds per step")
    _decoding(panels["decoding"], report)
    figures.title(figure, _finding(report))
    figures.save(figure, path)


def _finding(report: Report) -> str:
    on = f"{report.name} on {report.gpus} x {report.gpu.name}"
    if not report.plans:
        return f"{on}: no layout fits (predicted)"
    best = report.plans[0]
    return (
        f"{on}: {best.layout} is fastest, {best.step.tokens_per_gpu_second:,.0f} tokens/s a GPU at"
        f" {best.step.mfu:.0%} MFU (predicted)"
    )


def _decoding(axes: Any, report: Report) -> None:
    names = list(dict.fromkeys(row.name for row in report.decodings))
    for i, (name, colour) in enumerate(figures.colours(names).items()):
        rows = [row for row in report.decodings if row.name == name]
        # Earlier lines are wider, so that lines that coincide stay visible.
        width = 1.6 + 0.5 * (len(names) - 1 - i)
        axes.plot(
            *([r.context for r in rows], [r.floor_ms for r in rows]),
            marker="o",
            markersize=width + 3,
            linewidth=width,
            linestyle="--" if "cut" in name else "-",
            color=colour,
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens of context")
    figures.token_ticks(axes.xaxis, [row.context for row in report.decodings])
    figures.plain_log(axes.yaxis)
    first = report.decodings[0]
    axes.set_title(f"Decoding on {first.devices} GPUs, batch {first.batch}: least ms per token")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)


def _stack(axes: Any, labels: list[str], parts: dict[str, list[float]]) -> None:
    left = [0.0] * len(labels)
    for name, values in parts.items():
        if any(values):
            axes.barh(labels, values, left=left, label=name, color=PARTS[name])
            left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", labelsize=9)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.4, -0.08), ncols=5, frameon=False, fontsize="small"
    )
