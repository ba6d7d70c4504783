"""The table of an analysis, and its findings in a few lines."""

from __future__ import annotations

import math
from typing import Any

from megatron_mlra.evaluation.analysis.passes import mean_off_diagonal

IDLE = 0.001
"""Nats per token: a branch whose ablation in one layer costs less than this is called idle."""


def divergence_share(layer: dict[str, Any]) -> float | None:
    """Mean Jensen-Shannon divergence of a layer's pairs of branches, as a share of its bound ln 2;
    None for one branch."""
    mean = mean_off_diagonal(layer["divergence"])
    return None if mean is None else mean / math.log(2)


def costs(found: dict[str, Any]) -> list[tuple[float, int, int]]:
    """(nats per token, layer, branch) of each branch ablated in one layer, ascending."""
    return sorted(
        (cost["loss"], i, branch)
        for i, layer in enumerate(found["layers"])
        for branch, cost in enumerate(layer.get("ablation", ()))
    )


def idle(found: dict[str, Any]) -> list[tuple[int, int]]:
    """(layer, branch) of the branches that cost less than IDLE."""
    return [(layer, branch) for loss, layer, branch in costs(found) if loss < IDLE]


def verdict(found: dict[str, Any]) -> list[str]:
    """The findings, one per line: costs of branches, similarity of branches, ratio of variances."""
    lines = []
    ordered = costs(found)
    several = found["branches"] > 1
    if ordered:
        low, high, count = ordered[0], ordered[-1], len(idle(found))
        what = "a branch" if several else "a layer's attention"
        lines.append(
            f"{what} left out of one layer costs {low[0]:.4f} to {high[0]:.4f} nats per token;"
            f" {count or 'none'} of {len(ordered)} idle (below {IDLE})"
        )
    if several:
        shares = [divergence_share(layer) for layer in found["layers"]]
        cosines = [mean_off_diagonal(layer["cosine"]) for layer in found["layers"]]
        lines.append(
            f"branches' attention rows differ by {min(shares):.2f} to {max(shares):.2f} of the most"
            f" there can be; cosine of their outputs {min(cosines):.2f} to {max(cosines):.2f}"
        )
    ratios = [
        _mean(layer["nope_key_variance"]) / layer["rope_key_variance"]
        for layer in found["layers"]
        if layer["rope_key_variance"]  # None without RoPE, 0 for a single token
    ]
    if not ratios:
        return lines
    factor = found["calibration"]
    applied = "as trained" if found["variance_scaling"] else "if calibrated (this model is not)"
    lines.append(
        f"variance of NoPE keys over that of RoPE keys {min(ratios):.2f} to {max(ratios):.2f}"
        f" {applied}, {min(ratios) / factor:.2f} to {max(ratios) / factor:.2f} without calibration"
    )
    return lines


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(found: dict[str, Any]) -> str:
    """One line per layer."""
    head = ["layer", "var RoPE", "var NoPE", "uncalibrated", "entropy of branches"]
    several = found["branches"] > 1
    head += ["cosine", "divergence"] * several + ["rank of latents"]
    ablated = "ablation" in found["layers"][0]
    head += ["ablating each branch"] * ablated
    rows = []
    for number, layer in enumerate(found["layers"], 1):
        row = [
            str(number),
            "-" if layer["rope_key_variance"] is None else f"{layer['rope_key_variance']:.3f}",
            f"{_mean(layer['nope_key_variance']):.3f}",
            f"{_mean(layer['nope_key_variance_without_calibration']):.3f}",
            " ".join(f"{value:.2f}" for value in layer["entropy"]),
        ]
        if several:
            row += [f"{mean_off_diagonal(layer['cosine']):.2f}", f"{divergence_share(layer):.2f}"]
        row.append(" ".join(f"{value:.0f}" for value in layer["latent_effective_rank"]))
        if ablated:
            row.append(" ".join(f"{cost['loss']:+.4f}" for cost in layer["ablation"]))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [[name.rjust(w) for name, w in zip(row, widths, strict=True)] for row in (head, *rows)]
    return "\n".join("  ".join(line) for line in lines)


LEGEND = (
    "variances of keys over tokens; entropy in nats; divergence: Jensen-Shannon, share of ln 2;"
    " rank: effective; ablation: nats per token more"
)
