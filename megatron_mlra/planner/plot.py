"""The planner's report as one picture."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_mlra.command_line.parser import aside, own_name
from megatron_mlra.planner.memory import GIB
from megatron_mlra.planner.report import Report


def draw(report: Report, path: Path) -> None:
    """Memory and time of the best layouts, decoding floors over context; written whole or not.

    Raises:
        ValueError: for a picture format matplotlib does not know, or where it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError(f"--plot {path} needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    known = plt.figure().canvas.get_supported_filetypes()
    plt.close("all")
    if path.suffix.lstrip(".") not in known:
        raise ValueError(f"--plot {path}: use a name that ends in .png, .svg or .pdf")
    figure, (memory, time, decoding) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    figure.suptitle(f"{report.name} on {report.gpus} x {report.gpu.name} (predictions)")
    labels = [f"{p.layout}\nmicro {p.layout.micro_batch}" for p in report.plans]
    held = ("weights", "gradients", "optimizer", "activations", "working")
    _stack(memory, labels, {k: [getattr(p.memory, k) / GIB for p in report.plans] for k in held})
    memory.axvline(report.gpu.memory_gb * 1e9 / GIB, color="black", linestyle=":")
    memory.set_xlabel("GiB a GPU")
    parts = ("compute", "elementwise", "tensor", "context", "expert", "pipeline", "bubble")
    parts += ("data", "optimizer")
    _stack(time, labels, {k: [getattr(p.step, k) for p in report.plans] for k in parts})
    time.set_xlabel("seconds a step")
    for name in dict.fromkeys(row.name for row in report.decodings):
        rows = [row for row in report.decodings if row.name == name]
        decoding.plot([r.context for r in rows], [r.floor_ms for r in rows], "o-", label=name)
    decoding.set(xscale="log", yscale="log", xlabel="context", ylabel="least ms a token")
    decoding.legend(fontsize="small")
    partial = aside(own_name(path))
    figure.savefig(partial, format=path.suffix.lstrip("."), dpi=120)
    plt.close(figure)
    os.replace(partial, path)


def _stack(axes, labels: list[str], parts: dict[str, list[float]]) -> None:
    left = [0.0] * len(labels)
    for name, values in parts.items():
        if any(values):
            axes.barh(labels, values, left=left, label=name)
            left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.legend(fontsize="small")
