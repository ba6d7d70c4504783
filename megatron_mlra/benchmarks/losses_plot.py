"""The figure of several runs' losses."""

from __future__ import annotations

from pathlib import Path

from megatron_mlra.benchmarks.losses_files import Run, smooth
from megatron_mlra.command_line import figures

ALIKE = 2.0
"""Largest difference in per cent, in the second half, of curves that are drawn as one."""


def plot(runs: dict[str, Run], window: int, path: Path) -> None:
    """Draw losses over steps, and the relative difference of each running mean to the first run."""
    figure, ((curves, differences),) = figures.sheet(1, 2)
    first, *others = runs
    means = {name: smooth(run, window) for name, run in runs.items()}
    apart = {
        name: {
            s: 100 * (loss / means[first][s] - 1) for s, loss in found.items() if s in means[first]
        }
        for name, found in means.items()
    }
    half = max(max(r.steps) for r in runs.values()) / 2
    gaps = [(step, abs(gap)) for found in apart.values() for step, gap in found.items()]
    most = max((gap for _, gap in gaps), default=0.0)
    alike = max((gap for step, gap in gaps if step > half), default=0.0) <= ALIKE
    looks = figures.colours(runs)
    run = runs[first]
    curves.plot(run.steps, run.losses, color="#cccccc", linewidth=0.8)
    for name in [first] if alike else runs:
        curves.plot(*_centred(means[name], window), color=looks[name], linewidth=2)
    curves.set(xlabel="step", yscale="log")
    figures.plain_log(curves.yaxis)
    curves.set_ylim(0.95 * min(min(r.losses) for r in runs.values()))
    alone = f"; the others lie within {most:.2g} % of it" if others and alike else ""
    curves.set_title(f"nats per token, mean of {window} steps\n(grey: {first}{alone})")
    for name in runs:
        differences.plot(
            *_centred(apart[name], window),
            color=looks[name],
            linewidth=1.8,
            linestyle=":" if name == first else "-",
            label=name,
        )
    differences.set(xlabel="step")
    differences.set_title(f"per cent above {first}, mean of {window} steps\n")
    figures.title(figure, _finding(runs, window))
    figures.legend_below(figure, differences.get_legend_handles_labels()[0], 6)
    figures.save(figure, path)


def _centred(values: dict[int, float], window: int) -> tuple[list[float], list[float]]:
    """x and y of running means, each drawn at the middle of its window."""
    return [step - window / 2 for step in values], list(values.values())


def _finding(runs: dict[str, Run], window: int) -> str:
    """The figure's statement: how much the runs differ at their end."""
    tails = {name: run.tail(window)[0] for name, run in runs.items()}
    first, *others = tails
    if not others:
        return f"{first} ends at {tails[first]:.3f} nats per token"
    gaps = {name: 100 * (tails[name] / tails[first] - 1) for name in others}
    far = max(gaps, key=lambda name: abs(gaps[name]))
    side = "above" if gaps[far] > 0 else "below"
    if len(others) == 1:
        return f"{far} ends {abs(gaps[far]):.2f} % {side} {first}"
    return f"All runs end within {abs(gaps[far]):.2f} % of {first}, {far} farthest {side} it"
