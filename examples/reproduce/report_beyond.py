"""Tables and text on the runs beyond the loss: cloze words, long contexts, and statistics of
attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import figures
from megatron_mlra.evaluation.analysis.passes import mean_off_diagonal
from megatron_mlra.evaluation.analysis.report import IDLE, costs, divergence_share, idle
from page import Table

CHANCE = 0.25
"""Accuracy of guessing among four choices."""


@dataclass(frozen=True)
class Beyond:
    """The runs of one mechanism and their results."""

    mechanism: str
    runs: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The mechanism's name in tables and figures."""
        return figures.NAMES[self.mechanism]

    def mean(self, value: Callable[[dict[str, Any]], float]) -> float:
        """Mean over seeds of `value`, which takes the part `beyond` of a run's result."""
        return fmean(value(run["beyond"]) for run in self.runs)

    def cloze(self, name: str) -> float:
        """Mean over seeds of the cloze set's `greedy` or `log_likelihood`, before the training at a
        longer context."""
        return self.mean(lambda found: found["base"]["cloze"][name])

    def accuracy(self, length: int, task: str | None = None) -> float:
        """Accuracy at `length` tokens of a long-context task, or the mean over all tasks (None),
        after the training at a longer context."""

        def value(found: dict[str, Any]) -> float:
            groups = found["extended"][f"long_{length}"]["groups"]
            return fmean(each["acc"] for name, each in groups.items() if task in (None, name))

        return self.mean(value)

    def layers(self, value: Callable[[dict[str, Any]], float]) -> list[float]:
        """Per layer, the mean over seeds of `value`, which takes the layer's analysis."""
        told = [[value(x) for x in run["beyond"]["analysis"]["layers"]] for run in self.runs]
        return [fmean(each) for each in zip(*told, strict=True)]

    def is_latent(self) -> bool:
        """Whether the mechanism has latent heads, so that its attention was analyzed."""
        return all("analysis" in run["beyond"] for run in self.runs)


def grouped(results: list[dict[str, Any]], phase: str) -> list[Beyond]:
    """The finished runs of a phase by mechanism, in the order of the figures."""
    found = [r for r in results if r["phase"] == phase and not r.get("diverged")]
    by_mechanism = {m: [r for r in found if r["mechanism"] == m] for m in figures.NAMES}
    return [Beyond(mechanism, runs) for mechanism, runs in by_mechanism.items() if runs]


def diverged(results: list[dict[str, Any]], phase: str) -> dict[str, int]:
    """Mechanism -> number of its runs of a phase that diverged, where there are any."""
    return Counter(r["mechanism"] for r in results if r["phase"] == phase and r.get("diverged"))


def lengths(rows: list[Beyond]) -> list[int]:
    """Lengths of the long contexts in tokens, rising."""
    names = rows[0].runs[0]["beyond"]["extended"]
    return sorted(int(name.removeprefix("long_")) for name in names if name.startswith("long_"))


def tasks(rows: list[Beyond]) -> list[str]:
    """Names of the long-context tasks."""
    return [*rows[0].runs[0]["beyond"]["extended"][f"long_{lengths(rows)[0]}"]["groups"]]


def tables(rows: list[Beyond], what: str) -> list[Table]:
    """All tables of a phase's runs.

    Args:
        what: what the tables are of, for their titles.
    """
    import math

    sizes = lengths(rows)
    head = ["mechanism", "seeds", "last words right", "perplexity of the word"]
    head += [f"long contexts, {figures.common.tokens(size)}" for size in sizes]
    body = [
        [
            *(row.name, str(len(row.runs)), f"{row.cloze('greedy'):.3f}"),
            f"{math.exp(-row.cloze('log_likelihood')):.1f}",
            *(f"{row.accuracy(size):.3f}" for size in sizes),
        ]
        for row in rows
    ]
    found: list[Table] = [(f"Cloze words and long contexts, {what}", head, body)]
    last = figures.common.tokens(sizes[-1])
    names = tasks(rows)
    by_task = [[r.name, *(f"{r.accuracy(sizes[-1], task):.3f}" for task in names)] for r in rows]
    shown = [name.replace("_", " ") for name in names]
    found.append((f"Long contexts by task at {last}, {what}", ["mechanism", *shown], by_task))
    if latent := [row for row in rows if row.is_latent()]:
        found.append(_why(latent, what))
    return found


def variance_ratio(layer: dict[str, Any], calibrated: bool) -> float:
    """Variance of NoPE keys over variance of RoPE keys in one layer."""
    name = "nope_key_variance" + ("" if calibrated else "_without_calibration")
    return fmean(layer[name]) / layer["rope_key_variance"]


def _why(rows: list[Beyond], what: str) -> Table:
    head = ["mechanism", "NoPE / RoPE variance", "without calibration", "entropy, nats"]
    head += ["divergence / ln 2", "cosine", "cheapest branch", f"idle (below {IDLE})"]

    def span(values: list[float], digits: int = 2) -> str:
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    body = []
    for row in rows:
        analyses = [run["beyond"]["analysis"] for run in row.runs]
        line = [row.name]
        line += [span(row.layers(lambda x, on=on: variance_ratio(x, on))) for on in (True, False)]
        line.append(span(row.layers(lambda x: fmean(x["entropy"]))))
        several = analyses[0]["branches"] > 1
        line.append(span(row.layers(divergence_share)) if several else "")
        line.append(span(row.layers(lambda x: mean_off_diagonal(x["cosine"]))) if several else "")
        line.append(f"{min(costs(found)[0][0] for found in analyses):.4f}")
        count = sum(len(idle(found)) for found in analyses)
        line.append(f"{count} of {sum(len(costs(found)) for found in analyses)}")
        body.append(line)
    return f"What the attention does by layer, {what}", head, body


def note(
    rows: list[Beyond],
    size: str,
    phase: dict[str, Any] | None = None,
    lost: Mapping[str, int] | None = None,
) -> str:
    """A paragraph on what the runs were asked: number of items, steps and tokens.

    Args:
        phase: the ladder file's entry; the runs that it plans and that are not finished are told.
        lost: mechanism -> number of runs that diverged, which are told too.
    """
    first = rows[0].runs[0]
    extension = first["beyond"]["extension"]
    base, long = (first["beyond"][name] for name in ("base", "extended"))
    told = ", ".join(f"{figures.NAMES[name]} {count}" for name, count in (lost or {}).items())
    per_task = next(iter(long[f"long_{lengths(rows)[0]}"]["groups"].values()))["items"]
    return (
        f"Beyond the loss, size `{size}`: {base['cloze']['items']:,} last words of passages of the"
        f" held-out books; six long-context tasks of four choices (chance {CHANCE:.0%}),"
        f" {per_task} items of each at each length, behind {extension['steps']:,} steps at"
        f" {extension['seq_length']:,} tokens. Nothing here was tested for significance."
        f"{_missing(rows, phase, lost or {})}" + (f" Diverged: {told}." if told else "")
    )


def _missing(rows: list[Beyond], phase: dict[str, Any] | None, lost: Mapping[str, int]) -> str:
    """A sentence on the planned runs that are not finished, or ''."""
    if phase is None:
        return ""
    have = {row.mechanism: len(row.runs) for row in rows}
    counts = {name: have.get(name, 0) for name in phase["mechanisms"]}
    if min(count + lost.get(name, 0) for name, count in counts.items()) >= phase["seeds"]:
        return ""
    told = ", ".join(f"{figures.NAMES[name]} {count}" for name, count in counts.items())
    return f" Not the whole table; seeds finished of {phase['seeds']}: {told}."
