"""Statistics of the ladder: means over seeds, differences to MLA and which of them count.

The rule was fixed before the runs (docs/evidence.md): the measure is the mean of the held-out sets'
losses. A difference to MLA counts where the p-value of Welch's t-test, corrected by Holm's method
over the comparisons of one family, is below 0.05. Nothing else counts. The mechanisms that have
most seeds by plan are one family, all others another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from ladder import mean_loss

REFERENCE = "mla"
LEVEL = 0.05
MAIN = ("mlra4", "mlra4-gated", "gla2", "gqa")
"""The family of the comparisons that the evidence is made for."""
MEAN = "mean"
"""The name of the measure beside those of the sets."""


@dataclass
class Row:
    """One mechanism at one size."""

    mechanism: str
    results: list[dict[str, Any]]
    """Runs that did not diverge, by seed."""
    diverged: int
    p: float | None = None
    """Of the difference to MLA in the measure, after Holm's correction."""

    def losses(self, name: str = MEAN) -> list[float]:
        """The loss of each seed on a set, or the measure."""
        if name == MEAN:
            return [mean_loss(result) for result in self.results]
        return [result["held_out"][name]["loss"] for result in self.results]

    def mean(self, name: str = MEAN) -> float:
        """Over seeds; NaN where all diverged."""
        losses = self.losses(name)
        return fmean(losses) if losses else math.nan

    def error(self, name: str = MEAN) -> float:
        """Standard error of the mean, NaN for one seed."""
        losses = self.losses(name)
        return stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan

    @property
    def counts(self) -> bool:
        """Whether its difference to MLA counts."""
        return self.p is not None and self.p < LEVEL


def half_width(losses: list[float]) -> float:
    """Half of the 95 % interval of the mean of some seeds, NaN for one."""
    if len(losses) < 2:
        return math.nan
    from scipy.stats import t

    return t.ppf(1 - LEVEL / 2, len(losses) - 1) * stdev(losses) / math.sqrt(len(losses))


def difference(row: Row, reference: Row, name: str = MEAN) -> tuple[float, float, float]:
    """Mean difference to the reference and its 95 % interval (Welch), NaN where a side has fewer
    than two seeds."""
    a, b = row.losses(name), reference.losses(name)
    delta = row.mean(name) - reference.mean(name)
    if min(len(a), len(b)) < 2:
        return delta, math.nan, math.nan
    from scipy.stats import ttest_ind

    low, high = ttest_ind(a, b, equal_var=False).confidence_interval(1 - LEVEL)
    return delta, float(low), float(high)


def compare(results: Iterable[dict[str, Any]], phase: str) -> list[Row]:
    """A row for each mechanism of a phase, by rising mean loss, with corrected p-values."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if result["phase"] == phase:
            grouped.setdefault(result["mechanism"], []).append(result)
    rows = []
    for mechanism, found in grouped.items():
        good = sorted((r for r in found if not r.get("diverged")), key=lambda r: r["seed"])
        rows.append(Row(mechanism, good, len(found) - len(good)))
    rows.sort(key=lambda row: row.mean() if row.results else math.inf)
    reference = next((row for row in rows if row.mechanism == REFERENCE), None)
    if reference is not None:
        _holm([row for row in rows if row.mechanism in MAIN], reference)
        _holm([row for row in rows if row.mechanism not in (REFERENCE, *MAIN)], reference)
    return rows


def _holm(rows: list[Row], reference: Row) -> None:
    """Holm's correction of the p-values of a family of rows against the reference."""
    from scipy.stats import ttest_ind

    b = reference.losses()
    tested = [row for row in rows if min(len(row.results), len(b)) > 1]
    raw = {id(row): float(ttest_ind(row.losses(), b, equal_var=False).pvalue) for row in tested}
    highest = 0.0
    for rank, row in enumerate(sorted(tested, key=lambda row: raw[id(row)])):
        highest = max(highest, min(1.0, raw[id(row)] * (len(tested) - rank)))
        row.p = highest


def smallest_detectable(rows: list[Row]) -> float:
    """The difference that Welch's test at 5 % would find in 4 of 5 repeats between two mechanisms
    with the seeds there are, by the spread pooled over all rows (2.8 standard errors)."""
    spreads = [
        (len(row.results) - 1, stdev(row.losses()) ** 2) for row in rows if len(row.results) > 1
    ]
    if not spreads:
        return math.nan
    pooled = math.sqrt(sum(n * v for n, v in spreads) / sum(n for n, _ in spreads))
    seeds = max(len(row.results) for row in rows)
    return 2.8 * pooled * math.sqrt(2 / seeds)
