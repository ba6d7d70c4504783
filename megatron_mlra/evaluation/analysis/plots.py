"""The figure of an analysis: one panel per question, over layers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_mlra.command_line import figures
from megatron_mlra.evaluation.analysis.passes import mean_off_diagonal
from megatron_mlra.evaluation.analysis.report import IDLE, divergence_share, idle

DARK, LIGHT = figures.OTHERS[0], "#9a9a9a"


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the result of `mlra analyze` into a file."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    branches, several = found["branches"], found["branches"] > 1
    panels = [_variance, _entropy, _rank, _up_rank]
    panels += [_likeness] * several + [_ablation] * ("ablation" in found["layers"][0])
    columns = math.ceil(len(panels) / 2)
    figure, axes = figures.sheet(2, columns)
    flat = [panel for row in axes for panel in row]
    for panel, draw_one in zip(flat, panels, strict=False):
        draw_one(panel, found)
        panel.set_xlabel("layer")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in flat[len(panels) :]:
        panel.set_visible(False)
    colours = _colours(found)
    name = "branch" if several else found["variant"]
    marks = [
        Line2D([], [], color=colour, marker="o", label=f"{name} {i}" if several else name)
        for i, colour in enumerate(colours, 1)
    ]
    marks += [
        Line2D([], [], color=DARK, marker="s", label="RoPE keys; cosine; keys"),
        Line2D([], [], color=LIGHT, marker="^", linestyle="--", label="without calibration"),
        Line2D([], [], color=LIGHT, marker="^", label="values; divergence"),
    ]
    figures.legend_below(figure, marks, max(4, branches))
    figures.title(figure, _headline(found), f"{found['tokens']:,} held-out tokens")
    figures.save(figure, path)


def _headline(found: dict[str, Any]) -> str:
    """The figure's statement."""
    said = found["variant"]
    if "ablation" not in found["layers"][0]:
        return f"{said}: what its attention does by layer"
    count = len(idle(found))
    total = found["branches"] * len(found["layers"])
    what = "branches" if found["branches"] > 1 else "layers' attentions"
    if count:
        return f"{said}: {count} of {total} {what} are idle (cost less than {IDLE} nats per token)"
    return f"{said}: none of {total} {what} is idle (each costs {IDLE} nats per token or more)"


def _colours(found: dict[str, Any]) -> list[str]:
    """One colour per branch; for a single branch that of its kind of attention."""
    if found["branches"] == 1:
        return [figures.colours([found["variant"]])[found["variant"]]]
    # The first of these colours is that of the RoPE keys.
    return list(figures.OTHERS[1:] * found["branches"])[: found["branches"]]


def _layers(found: dict[str, Any]) -> range:
    return range(1, len(found["layers"]) + 1)


def _by_branch(panel: Any, found: dict[str, Any], values: list[list[float]]) -> None:
    """Draw one line per branch of values `[layer][branch]`."""
    for branch, colour in enumerate(_colours(found)):
        line = [each[branch] for each in values]
        panel.plot(_layers(found), line, "o-", color=colour, markersize=4)


def _variance(panel: Any, found: dict[str, Any]) -> None:
    rope = [layer["rope_key_variance"] for layer in found["layers"]]
    nope = [layer["nope_key_variance"] for layer in found["layers"]]
    without = [layer["nope_key_variance_without_calibration"] for layer in found["layers"]]
    if rope[0] is not None:
        panel.plot(_layers(found), rope, "s-", color=DARK, markersize=4)
    _by_branch(panel, found, nope)
    mean = [sum(each) / len(each) for each in without]
    panel.plot(_layers(found), mean, "^--", color=LIGHT, markersize=4)
    panel.set_yscale("log")
    panel.set_ylabel("over tokens")
    panel.set_title("Variance of NoPE and RoPE keys")


def _entropy(panel: Any, found: dict[str, Any]) -> None:
    _by_branch(panel, found, [layer["entropy"] for layer in found["layers"]])
    figures.from_zero(panel)
    most = found["layers"][0]["entropy_of_equal_weights"]
    panel.set_ylabel("nats")
    panel.set_title(f"Entropy of attention (at most {most:.2f})")


def _rank(panel: Any, found: dict[str, Any]) -> None:
    size, per_branch = found["latent_dim"], found["latent_heads"] // found["branches"]
    ranks = [layer["latent_effective_rank"] for layer in found["layers"]]
    for i, colour in enumerate(_colours(found)):
        for group in range(per_branch):
            line = [each[i * per_branch + group] for each in ranks]
            panel.plot(_layers(found), line, "o-", color=colour, markersize=4)
    figures.from_zero(panel)
    panel.set_ylabel("effective rank")
    panel.set_title(f"Rank of latent heads (of {size})")


def _up_rank(panel: Any, found: dict[str, Any]) -> None:
    for name, colour, mark in (("key", DARK, "s-"), ("value", LIGHT, "^-")):
        ranks = [layer[f"{name}_up_projection_effective_rank"] for layer in found["layers"]]
        for latent in range(found["latent_heads"]):
            line = [each[latent] for each in ranks]
            panel.plot(_layers(found), line, mark, color=colour, markersize=4, alpha=0.7)
    figures.from_zero(panel)
    panel.set_ylabel("effective rank")
    panel.set_title(f"Rank of up-projections (of {found['latent_dim']})")


def _likeness(panel: Any, found: dict[str, Any]) -> None:
    cosine = [mean_off_diagonal(layer["cosine"]) for layer in found["layers"]]
    panel.plot(_layers(found), cosine, "s-", color=DARK, markersize=4)
    shares = [divergence_share(layer) for layer in found["layers"]]
    panel.plot(_layers(found), shares, "^-", color=LIGHT, markersize=4)
    panel.set_ylim(min(0, *cosine) - 0.02, 1.02)
    panel.set_ylabel("cosine; divergence / ln 2")
    panel.set_title("Likeness of branches, pairs")


def _ablation(panel: Any, found: dict[str, Any]) -> None:
    costs = [[each["loss"] for each in layer["ablation"]] for layer in found["layers"]]
    _by_branch(panel, found, costs)
    for branch, colour in enumerate(_colours(found)):
        errors = [layer["ablation"][branch]["standard_error"] for layer in found["layers"]]
        if None not in errors:
            line = [each[branch] for each in costs]
            panel.errorbar(_layers(found), line, yerr=errors, fmt="none", color=colour, capsize=2)
    panel.set_yscale("symlog", linthresh=IDLE)
    panel.axhspan(-IDLE, IDLE, color="#000000", alpha=0.06, linewidth=0)
    panel.set_ylabel("nats per token")
    what = "a branch" if found["branches"] > 1 else "the attention"
    panel.set_title(f"Held-out loss more without {what}")
