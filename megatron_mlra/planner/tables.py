"""The planner's report as rich tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from megatron_mlra.cost.cache import kv_cache_bytes_per_token
from megatron_mlra.cost.flops import train_flops_per_token
from megatron_mlra.cost.parameters import parameters
from megatron_mlra.planner.memory import gib
from megatron_mlra.planner.report import Report


def print_report(report: Report) -> None:
    """Print a report's tables for a person, on stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=130)
    for part in tables(report):
        console.print(part)


def tables(report: Report) -> Iterator[Table | str]:
    """What to print, in order."""
    yield from _head(report)
    if report.plans:
        yield _layouts(report)
        yield _traffic(report)
    else:
        yield "No layout fits."
    if report.misfits:
        yield _misfits(report)
    yield from _attention(report)
    yield _decoding(report)
    stated = ", ".join(f"{name} {value:g}" for name, value in asdict(report.assume).items())
    yield f"Predictions, not measurements. Assumed: {stated}. Rates: {report.gpu.source}."


def _head(report: Report) -> Iterator[str]:
    shape, counts = report.shape, parameters(report.shape)
    flops = train_flops_per_token(shape)
    active = "" if counts.active == counts.total else f" ({counts.active:,} a token)"
    yield (
        f"[bold]{report.name}[/]: {shape.attention_variant}, {counts.total:,} parameters{active},"
        f" {report.global_batch:,} sequences of {shape.seq_length:,} tokens a step on"
        f" {report.gpus:,} x {report.gpu.name}{', FP8' if report.fp8 else ''}"
    )
    yield (
        f"training FLOPs a token: {flops.model:.3e} of the model, {flops.hardware:.3e} run;"
        f" KV cache {kv_cache_bytes_per_token(shape):,} bytes a token, all layers"
    )


def _layouts(report: Report) -> Table:
    shown = f"{len(report.plans)} of {report.found}"
    table = Table(
        title=f"Layouts that fit, fastest first ({shown}); GiB a GPU", title_justify="left"
    )
    for name in ("layout", "micro", "recompute"):
        table.add_column(name, no_wrap=True)
    for name in ("weights", "grads", "optim", "activ", "total", "step s", "MFU", "tok/s/GPU"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in report.plans:
        held, step = plan.memory, plan.step
        table.add_row(
            str(plan.layout),
            str(plan.layout.micro_batch),
            plan.layout.recompute,
            gib(held.weights),
            gib(held.gradients),
            gib(held.optimizer),
            gib(held.activations + held.working),
            gib(held.total),
            f"{step.seconds:.3g}",
            f"{step.mfu:.0%}",
            f"{step.tokens_per_gpu_second:,.0f}",
        )
    return table


def _traffic(report: Report) -> Table:
    table = Table(title="What a GPU sends a step, GB", title_justify="left")
    table.add_column("layout", no_wrap=True)
    names = ("tensor", "context", "pipeline", "data", "expert")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("time beside products goes to")
    for plan in report.plans:
        sent = plan.step.traffic.to_json()
        table.add_row(
            str(plan.layout), *(f"{sent[name] / 1e9:,.1f}" for name in names), plan.reason()
        )
    if report.layouts_traffic:
        both = ", ".join(
            f"{kind} {sent / 1e9:,.1f}" for kind, sent in report.layouts_traffic.items()
        )
        table.caption = f"tensor parallel under the first, by latent_tp_layout: {both}"
    return table


def _misfits(report: Report) -> Table:
    table = Table(title="What does not fit, nearest first", title_justify="left")
    table.add_column("layout", no_wrap=True)
    table.add_column("micro")
    table.add_column("recompute")
    table.add_column("why")
    for miss in report.misfits:
        layout = miss.layout
        table.add_row(str(layout), str(layout.micro_batch), layout.recompute, miss.why)
    return table


def _attention(report: Report) -> Iterator[str]:
    if report.surcharge:
        ratios = ", ".join(f"{r:.2f}x at {s:,}" for s, r in report.surcharge.items())
        yield f"training FLOPs over the same model with MLA: {ratios} tokens"


def _decoding(report: Report) -> Table:
    first = report.decodings[0]
    where = f"{first.devices} x {report.gpu.name}, batch {first.batch}, bf16"
    title = f"Decoding on {where}: least ms a token, by context"
    table = Table(title=title, title_justify="left")
    table.add_column("attention", no_wrap=True)
    table.add_column("KV B a token, device", justify="right", no_wrap=True)
    table.add_column("exchange", justify="right")
    contexts = sorted({row.context for row in report.decodings})
    for context in contexts:
        table.add_column(f"{context:,}", justify="right", no_wrap=True)
    for name in dict.fromkeys(row.name for row in report.decodings):
        rows = [row for row in report.decodings if row.name == name]
        cells = (f"{row.floor_ms:.2f}" for row in rows)
        exchange = f"{rows[0].exchange_ms:.2f}"
        table.add_row(name, f"{rows[0].kv_bytes_per_token:,}", exchange, *cells)
    table.caption = f"of these, weights {first.weights_ms:.2f} ms, the exchange, and the cache"
    return table
