"""Statistics of the ladder: means over seeds, differences to MLA, and which differences count.

The rule was fixed before the runs (docs/evidence.md). The measure is the mean of the losses on the
held-out sets. A difference to MLA counts where the p-value of Welch's t-test, corrected by Holm's
method over the comparisons of one family, is below 0.05. Nothing else counts. The mechanisms of
`MAIN` are one family, all others another. A mechanism is tested once all of its planned seeds and
MLA's have ended, and a family is as large as it was planned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from ladder import mean_loss

REFERENCE = "mla"
LEVEL = 0.05
MAIN = ("mlra4", "mlra4-gated", "gla2", "gqa")
"""The mechanisms of the first family: the comparisons that the ladder was planned for."""
MEAN = "mean"
"""The name of the measure, where the held-out sets have names too."""


@dataclass
class Row:
    """One mechanism at one size."""

    mechanism: str
    results: list[dict[str, Any]]
    """Results of the runs that did not diverge, by rising seed."""
    diverged: int
    """Number of runs that diverged."""
    p: float | None = None
    """p-value of the measure's difference to MLA, after Holm's correction; None: not tested."""

    def losses(self, name: str = MEAN) -> list[float]:
        """Loss of each seed in nats per token: on the held-out set `name`, or the measure."""
        if name == MEAN:
            return [mean_loss(result) for result in self.results]
        return [result["held_out"][name]["loss"] for result in self.results]

    def mean(self, name: str = MEAN) -> float:
        """Mean of `losses` over seeds; NaN where all seeds diverged."""
        losses = self.losses(name)
        return fmean(losses) if losses else math.nan

    def error(self, name: str = MEAN) -> float:
        """Standard error of the mean over seeds, NaN for fewer than two seeds."""
        losses = self.losses(name)
        return stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan

    def speeds(self, timed: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
        """Device -> training tokens per second of the runs among `timed` that are of this mechanism
        and size and had the device for themselves."""
        found: dict[str, list[float]] = {}
        for result in timed:
            alike = (result["mechanism"], result["size"]) == (self.mechanism, self.size)
            alone = result.get("runs_at_once", 1) == 1
            if alike and alone and result["tokens_per_second"]:
                found.setdefault(result["device"], []).append(result["tokens_per_second"])
        return found

    @property
    def size(self) -> str | None:
        """The ladder's name of the size; None without results."""
        return self.results[0]["size"] if self.results else None

    @property
    def counts(self) -> bool:
        """Whether the mechanism's difference to MLA counts by the rule."""
        return self.p is not None and self.p < LEVEL


def half_width(losses: list[float]) -> float:
    """Half the width of the 95 % interval of the mean over seeds (Student's t), NaN for fewer than
    two seeds."""
    if len(losses) < 2:
        return math.nan
    from scipy.stats import t

    return t.ppf(1 - LEVEL / 2, len(losses) - 1) * stdev(losses) / math.sqrt(len(losses))


def difference(row: Row, reference: Row) -> tuple[float, float, float]:
    """The measure's difference to the reference, and the ends of its 95 % interval (Welch), which
    are NaN where a side has fewer than two seeds."""
    a, b = row.losses(), reference.losses()
    delta = row.mean() - reference.mean()
    if min(len(a), len(b)) < 2:
        return delta, math.nan, math.nan
    from scipy.stats import ttest_ind

    low, high = ttest_ind(a, b, equal_var=False).confidence_interval(1 - LEVEL)
    return delta, float(low), float(high)


def compare(
    results: Iterable[dict[str, Any]], phase: str, planned: Mapping[str, int] | None = None
) -> list[Row]:
    """A row per mechanism of a phase, by rising measure, with corrected p-values.

    Args:
        planned: mechanism -> number of seeds that the ladder plans. None: those that are there.
    """
    planned = planned or {}
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
    ended = [r for r in rows if len(r.results) + r.diverged >= planned.get(r.mechanism, 0)]
    if reference is None or reference not in ended:
        return rows
    for is_main in (True, False):
        family = {m for m in planned if (m in MAIN) == is_main} - {REFERENCE}
        found = [r for r in ended if (r.mechanism in MAIN) == is_main and r is not reference]
        _holm(found, reference, len(family))
    return rows


def _holm(rows: list[Row], reference: Row, planned: int) -> None:
    """Set `p` of a family's rows by Welch's test against the reference and Holm's correction.

    Args:
        planned: number of the family's comparisons, those that cannot be made yet included.
    """
    from scipy.stats import ttest_ind

    b = reference.losses()
    tested = [row for row in rows if min(len(row.results), len(b)) > 1]
    count = max(planned, len(tested))
    raw = {id(row): float(ttest_ind(row.losses(), b, equal_var=False).pvalue) for row in tested}
    highest = 0.0
    for rank, row in enumerate(sorted(tested, key=lambda row: raw[id(row)])):
        highest = max(highest, min(1.0, raw[id(row)] * (count - rank)))
        row.p = highest


def smallest_detectable(rows: list[Row]) -> float:
    """A difference between two mechanisms below which the rule mostly misses, in nats per token;
    NaN without two seeds.

    It is 2.8 standard errors of the difference: the variance is pooled over all rows, and each side
    has as many seeds as the row with the most. Welch's test at 5 % finds a difference of this size
    in 69 % of all trials of five seeds and in 56 % of three; at a quarter of 5 %, where Holm's
    method begins with four comparisons, in 41 % and 25 %.
    """
    spreads = [
        (len(row.results) - 1, stdev(row.losses()) ** 2) for row in rows if len(row.results) > 1
    ]
    if not spreads:
        return math.nan
    pooled = math.sqrt(sum(n * v for n, v in spreads) / sum(n for n, _ in spreads))
    seeds = max(len(row.results) for row in rows)
    return 2.8 * pooled * math.sqrt(2 / seeds)
