"""The planner's report as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from megatron_mlra.cost.cache import DTYPE, kv_cache_text
from megatron_mlra.cost.flops import train_flops_per_token
from megatron_mlra.cost.parameters import parameters
from megatron_mlra.planner.memory import size_unit, time_unit
from megatron_mlra.planner.report import Report

Row = tuple[list[str], list[str], list[str]]
"""(names, numbers, words) of a row: the cells of these three kinds of columns."""

LEAST_WORDS = 20
"""Least width of a column of words, in which text is wrapped."""


def print_report(report: Report, console: Console | None = None, details: bool = False) -> None:
    """Print a report to stdout, in the width of the terminal. The command for the best layout comes
    last.

    Args:
        details: print everything, and not the layouts alone.
    """
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=130)
    for part in tables(report, details):
        if isinstance(part, str):
            console.print(part)
        else:
            part.print(console)
    if report.command:
        best = report.plans[0].layout
        many = ", on every node" if any("--nnodes" in line for line in report.command) else ""
        console.print(f"To train by the first layout ({best}){many}:")
        for line in report.command:
            # Printed unchanged, since the user pastes the line into a shell.
            console.print(f"  {line}", markup=False, soft_wrap=True)


@dataclass
class Sheet:
    """A table whose numbers are never cut: a table that is too wide is printed as several.

    Attributes:
        names, numbers, words: heads of the columns. Each of the tables begins with the names; words
            may be wrapped.
        caption: printed below the last table.
    """

    title: str
    names: list[str]
    numbers: list[str]
    words: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    caption: str = ""

    def print(self, console: Console) -> None:
        """Print the table, or several below one another if the console is too narrow."""
        if self._fits(0, len(self.numbers), True, console):
            tables = [self._table(0, len(self.numbers), True)]
        else:
            tables = list(self._stack(console))
        for i, table in enumerate(tables):
            table.title = self.title if not i else None
            console.print(table)
        if self.caption:
            console.print(self.caption)

    def _stack(self, console: Console) -> Iterator[Table]:
        first = 0
        while first < len(self.numbers):
            last = len(self.numbers)
            while last > first + 1 and not self._fits(first, last, False, console):
                last -= 1
            yield self._table(first, last, False)
            first = last
        if self.words:
            yield self._table(first, first, True)

    def _table(self, first: int, last: int, with_words: bool) -> Table:
        table = Table(title_justify="left")
        for name in self.names:
            table.add_column(name, no_wrap=True)
        for name in self.numbers[first:last]:
            table.add_column(name, justify="right", no_wrap=True)
        for name in self.words if with_words else ():
            table.add_column(name, min_width=LEAST_WORDS)
        for names, numbers, words in self.rows:
            table.add_row(*names, *numbers[first:last], *(words if with_words else ()))
        return table

    def _fits(self, first: int, last: int, with_words: bool, console: Console) -> bool:
        unbound = console.options.update(max_width=10**6)
        # Only columns of words may be narrower than their widest cell.
        needed = Measurement.get(console, unbound, self._table(first, last, False)).maximum
        return needed + with_words * len(self.words) * (LEAST_WORDS + 3) <= console.width


def tables(report: Report, details: bool = False) -> Iterator[Sheet | str]:
    """The tables and lines to print, in order."""
    yield from _head(report)
    if report.plans:
        yield _layouts(report, details)
        yield from report.notes
    else:
        yield "No layout fits." + (f" Use {report.way_out}." if report.way_out else "")
    if not details:
        if not report.plans and report.misfits:
            yield _misfits(report)
        yield "Predictions, not measurements (--details: parts, assumptions, decoding)."
        return
    if report.plans:
        yield _traffic(report)
    if report.misfits:
        yield _misfits(report)
    yield from _attention(report)
    yield _decoding(report)
    stated = ", ".join(f"{name} {value:g}" for name, value in asdict(report.assume).items())
    yield f"Predictions, not measurements. Assumed: {stated}. Rates: {report.gpu.source}."


def _head(report: Report) -> Iterator[str]:
    shape, counts = report.shape, parameters(report.shape)
    flops = train_flops_per_token(shape)
    active = "" if counts.active == counts.total else f" ({counts.active:,} per token)"
    yield (
        f"[bold]{report.name}[/]: {shape.attention_variant}, {counts.total:,} parameters{active},"
        f" {report.global_batch:,} sequences of {shape.seq_length:,} tokens per step on"
        f" {report.gpus:,} x {report.gpu.name}{', FP8' if report.fp8 else ''}"
    )
    yield (
        f"training FLOPs per token: {flops.model:.3e} of the model, {flops.hardware:.3e} run;"
        f" {kv_cache_text(shape)}"
    )


def _layouts(report: Report, details: bool) -> Sheet:
    shown = f"{len(report.plans)} of {report.found}"
    held_by = ["weights", "grads", "optim", "activ"] if details else []
    # One unit a column, by its largest number, so that rows can be compared.
    size, unit = size_unit(max(plan.memory.total for plan in report.plans))
    second, clock = time_unit(max(plan.step.seconds for plan in report.plans))
    sheet = Sheet(
        f"Layouts that fit, fastest first ({shown}); {unit} per GPU",
        ["layout", "micro", "recompute"],
        [*held_by, "total" if details else unit, f"step {clock}", "MFU", "tok/s/GPU"],
    )
    for plan in report.plans:
        held, step = plan.memory, plan.step
        parts = held.weights, held.gradients, held.optimizer, held.activations + held.working
        numbers = [
            *(f"{count / size:.1f}" for count in (*parts, held.total)),
            f"{step.seconds / second:.3g}",
            f"{step.mfu:.0%}",
            f"{step.tokens_per_gpu_second:,.0f}",
        ]
        layout = plan.layout
        names = [str(layout), str(layout.micro_batch), layout.recompute]
        sheet.rows.append((names, numbers if details else numbers[4:], []))
    return sheet


def _traffic(report: Report) -> Sheet:
    names = ["tensor", "context", "pipeline", "data", "expert"]
    words = ["time beside products goes to"]
    sheet = Sheet("What a GPU sends a step, GB", ["layout"], names, words)
    for plan in report.plans:
        sent = plan.step.traffic.to_json()
        numbers = [f"{sent[name] / 1e9:,.1f}" for name in names]
        sheet.rows.append(([str(plan.layout)], numbers, [plan.reason()]))
    if report.layouts_traffic:
        both = ", ".join(
            f"{kind} {sent / 1e9:,.1f}" for kind, sent in report.layouts_traffic.items()
        )
        sheet.caption = f"tensor parallel under the first, by latent_tp_layout: {both}"
    return sheet


def _misfits(report: Report) -> Sheet:
    names = ["layout", "micro", "recompute"]
    sheet = Sheet("What does not fit, nearest first", names, [], ["why"])
    for miss in report.misfits:
        layout = miss.layout
        shown = [str(layout), str(layout.micro_batch), layout.recompute]
        sheet.rows.append((shown, [], [miss.why]))
    return sheet


def _attention(report: Report) -> Iterator[str]:
    if report.surcharge:
        ratios = ", ".join(f"{r:.2f}x at {s:,}" for s, r in report.surcharge.items())
        yield f"training FLOPs over the same model with MLA: {ratios} tokens"


def _decoding(report: Report) -> Sheet:
    first = report.decodings[0]
    where = f"{first.devices} x {report.gpu.name}, batch {first.batch}, {DTYPE}"
    contexts = sorted({row.context for row in report.decodings})
    sheet = Sheet(
        f"Decoding on {where}: least ms per token, by context",
        ["attention"],
        ["KV B a token, device", "exchange", *(f"{context:,}" for context in contexts)],
    )
    for name in dict.fromkeys(row.name for row in report.decodings):
        rows = [row for row in report.decodings if row.name == name]
        numbers = [f"{rows[0].kv_bytes_per_token:,}", f"{rows[0].exchange_ms:.2f}"]
        numbers += [f"{row.floor_ms:.2f}" for row in rows]
        sheet.rows.append(([name], numbers, []))
    sheet.caption = f"of these, weights {first.weights_ms:.2f} ms, the exchange, and the cache"
    return sheet
