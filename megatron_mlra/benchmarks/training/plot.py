"""The figure of a training benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mlra.command_line import figures


def plot(rows: list[dict[str, Any]], path: Path, source: str) -> None:
    """Draw tokens/s over sequence length, one line per variant, recipe and form.

    Args:
        rows: fields of measure.Result, as in training.json.
        source: GPU and commit.
    """
    figure, ((axes,),) = figures.sheet()
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        name = _name(row["variant"])
        key = (name, f"{name}, {row['recipe']}, {row['form']}")
        lines.setdefault(key, []).append((row["seq_length"], row["tokens_per_second"] / 1e3))
    looks = {"bf16": ("-", "o", None), "other": ("--", "s", "none")}
    for (name, label), points in lines.items():
        style, marker, face = looks["bf16" if ", bf16" in label else "other"]
        axes.plot(
            *zip(*sorted(points), strict=True),
            linestyle=style,
            marker=marker,
            markersize=9,
            markerfacecolor=face,
            markeredgewidth=2,
            linewidth=2.2,
            color=figures.colours([name])[name],
            label=label,
        )
        # Labels beside hollow marks and below filled ones: marks of one length may be close.
        place, align = ((10, -4), "left") if face else ((0, -20), "center")
        for length, rate in points:
            axes.annotate(
                f"{rate:.1f}", (length, rate), xytext=place, textcoords="offset points", ha=align
            )
    axes.set_xscale("log")
    lengths = sorted({row["seq_length"] for row in rows})
    figures.token_ticks(axes.xaxis, lengths)
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
    axes.set_xlabel("tokens per sequence")
    axes.set_title("1,000 tokens/s, higher is better")
    axes.set_ylim(0, 1.15 * max(row["tokens_per_second"] for row in rows) / 1e3)
    figures.title(figure, _finding(rows), source)
    figures.legend_below(figure, axes.get_legend_handles_labels()[0], 2)
    figures.save(figure, path)


def _name(variant: str) -> str:
    return "MLA (Megatron's)" if variant.startswith("stock-mla") else variant


def _finding(rows: list[dict[str, Any]]) -> str:
    """The figure's statement: bf16 rates relative to the fastest variant, at the shortest and
    longest sequences."""
    rates = {
        (_name(r["variant"]), r["seq_length"]): r["tokens_per_second"]
        for r in rows
        if r["recipe"] == "bf16"
    }
    lengths = sorted({length for _, length in rates})
    if not lengths:
        return "Training speed"
    ends = {}
    for length in dict.fromkeys((lengths[0], lengths[-1])):
        here = sorted(((rate, name) for (name, at), rate in rates.items() if at == length))
        (best, first), others = here[-1], here[-2::-1]
        for rate, name in others:
            at = f"{rate / best:.0%} ({figures.tokens(length)})"
            ends.setdefault((name, first), []).append(at)
    said = [
        f"{name} trains at {' to '.join(shares)} of the speed of {first}"
        for (name, first), shares in ends.items()
    ]
    return "; ".join(said) or f"{next(iter(rates))[0]}: training speed"
