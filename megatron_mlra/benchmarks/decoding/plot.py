"""The figure of a decoding benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mlra.command_line import figures

_STYLES = {
    "FP8": ("--", "s"), "sharded": (":", "^"), "tokens cut": ("-.", "D"), "nccl": ("-.", "x"),
    "one-shot": ("-.", "+"),
}  # fmt: skip
_VARIATIONS = ("FP8", "sharded", "nccl", "one-shot")
"""Words in the labels of cases that the figure's statement does not mention."""


def plot(records: list[dict[str, Any]], source: str, path: Path) -> None:
    """Draw the time per output token over context, one panel per number of ranks and batch.

    Args:
        records: of measure.py; those without `us` are left out.
        source: GPU and commit.
    """
    from matplotlib.lines import Line2D

    panels = sorted({(-_devices(r), r["batch"]) for r in records if "us" in r})
    columns = min(2, len(panels))
    figure, grid = figures.sheet(-(-len(panels) // columns), columns)
    handles: dict[str, Any] = {}
    for axes, (minus_devices, batch) in zip(grid.flat, panels, strict=False):
        devices = -minus_devices
        mine = [r for r in records if (_devices(r), r["batch"]) == (devices, batch) and "us" in r]
        names = sorted({r["label"] for r in mine}, key=lambda name: ("MLRA" not in name, name))
        for i, label in enumerate(names):
            points = sorted((r["context"], r["us"] / 1e3) for r in mine if r["label"] == label)
            line, marker = next((s for word, s in _STYLES.items() if word in label), ("-", "o"))
            # Earlier lines are wider, so that lines that coincide stay visible.
            width = 1.8 + 0.8 * (len(names) - 1 - i) if line == "-" else 1.8
            look = {"color": figures.colour(label), "linestyle": line, "marker": marker}
            axes.plot(*zip(*points, strict=True), linewidth=width, markersize=width + 4, **look)
            kind = label.rsplit(" ", 1)[0]
            handles.setdefault(kind, Line2D([], [], linewidth=2, label=kind, **look))
        axes.set(xscale="log", yscale="log", xlabel="tokens of context")
        figures.token_ticks(axes.xaxis, [r["context"] for r in mine])
        figures.plain_log(axes.yaxis)
        where = "the whole model" if devices == 1 else f"the share of one of {devices} ranks"
        if mine[0].get("gpus", 1) > 1:
            where = f"on {devices} GPUs"
        axes.set_title(f"{where}, {batch} sequence{'s' * (batch > 1)}: ms per output token")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figures.title(figure, _finding(records), source)
    figures.legend_below(figure, list(handles.values()), 6)
    figures.save(figure, path)


def _finding(records: list[dict[str, Any]]) -> str:
    """The figure's statement: bf16 variants by speed, at the longest context on the most ranks."""
    timed = [
        r for r in records if "us" in r and not any(word in r["label"] for word in _VARIATIONS)
    ]
    timed = timed or [r for r in records if "us" in r]
    devices = max(map(_devices, timed))
    batch = min(r["batch"] for r in timed)
    mine = [r for r in timed if (_devices(r), r["batch"]) == (devices, batch)]
    longest = max(r["context"] for r in mine)
    ranked = sorted(
        (r["us"], r["label"].rsplit(" ", 1)[0]) for r in mine if r["context"] == longest
    )
    what = f"a share of {devices} ranks" if devices > 1 else "one GPU"
    if mine[0].get("gpus", 1) > 1:
        what = f"{devices} GPUs"
    said = ", ".join(f"{name} {us / 1e3:.1f}" for us, name in ranked)
    return f"{figures.tokens(longest)} tokens of context on {what}, ms per token: {said}"


def _devices(record: dict[str, Any]) -> int:
    """Ranks that a record's model is cut over."""
    return record["tp"] * record.get("context_parallel", 1)
