"""The tables of decoding and training, and the one of README."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from kernel_tables import PEERS_GPU, fa3, kernel_times, peer_note
from measured import Cells, Result, Table, error, grid, newest, results, shape, table
from serving_tables import DEFAULT, Served, served

# Decoding: records of `mlra benchmark-decoding`.

PARTS = {"FP8": "FP8 cache", "sharded": "sharded weights", "nccl": "sums by NCCL"}


def case(label: str) -> str:
    """`MLRA-4 FP8 1/4` -> MLRA-4, FP8 cache, a TP4 rank."""
    name, *parts, where = label.split()
    place = where.replace("1/", "a TP") + " rank" if where.startswith("1/") else where
    return ", ".join([name, *(PARTS.get(part, part) for part in parts), place])


def step(record: dict[str, Any]) -> str:
    """Milliseconds and share of the roof, or the bytes that do not fit."""
    if "us" not in record:
        return f"needs {record['cache_bytes'] / 1e9:.0f} GB"
    share = f" ({100 * record['share']:.0f} %)" if "share" in record else ""
    return f"{record['us'] / 1e3:.2f}{share}"


def gates(records: Iterable[dict[str, Any]]) -> str:
    """The worst errors of a run's logits."""
    worst = {False: 0.0, True: 0.0}
    for r in records:
        fp8 = r["cache_dtype"] == "fp8" if "cache_dtype" in r else "FP8" in r["label"]
        worst[fp8] = max(worst[fp8], r.get("gate_error", 0.0))
    return f"Gate: logits within {error(worst[False])} of float32, FP8 {error(worst[True])}."


@table
def decoding() -> Table:
    source = newest("decoding")
    records = source.told["records"]
    fits = dict.fromkeys(shape(r) for r in records if r["fits"])
    cells = {(case(r["label"]), shape(r)): step(r) for r in records}
    rate = f"{source.told['read_gb_s']:,} GB/s"
    roof = f"Milliseconds a token; in brackets the share of the roof at {rate}."
    return Table([source], grid("", cells, fits), f"{roof} {gates(records)}")


@table
def decoding_bytes() -> Table:
    source = newest("decoding")
    cells: Cells = {}
    wanted = {"1 x 128K": "cache at 128K, GB", "1 x 512K": "at 512K", "32 x 32K": "32 x 32K"}
    for r in source.told["records"]:
        if r["cache_dtype"] == "auto":
            row = case(r["label"])
            cells[row, "weights GB"] = f"{r['weight_bytes'] / 1e9:.2f}"
            cells[row, "KV bytes per token"] = f"{r['cache_bytes_per_token']:.0f}"
            if shape(r) in wanted:
                cells[row, wanted[shape(r)]] = f"{r['cache_bytes'] / 1e9:.2f}"
    return Table([source], grid("case", cells), commands=False)


@table
def few_rows() -> Table:
    ways = {"cuBLAS": newest("few_rows_cublas"), "products of few rows": newest("few_rows")}
    cells: Cells = {}
    for fp8 in (False, True):
        for name, source in ways.items():
            for r in source.told["records"]:
                if ("FP8" in r["label"]) == fp8:
                    cells.setdefault((f"FP8 cache: {name}" if fp8 else name, shape(r)), step(r))
    records = [r for source in ways.values() for r in source.told["records"]]
    columns = sorted({column for _, column in cells}, key=lambda column: int(column.split()[0]))
    return Table([*ways.values()], grid("", cells, columns), gates(records))


@table
def decoding_two_gpus() -> Table:
    source = newest("decoding_two_gpus")
    records = source.told["records"]
    cells = {
        (case(r["label"]).rpartition(",")[0], shape(r)): f"{r['us'] / 1e3:.2f}"
        for r in records
        if "us" in r
    }
    cells |= {
        ("the roof of weights and cache", shape(r)): f"{r['roof_us'] / 1e3:.2f}"
        for r in records
        if r["label"] == "MLRA-4 x2" and "us" in r
    }
    return Table([source], grid("", cells), gates(records))


@table
def context_parallel() -> Table:
    """Latents, or the tokens of the cache, cut over two GPUs."""
    source = newest("context_parallel")
    cells: Cells = {}
    for r in source.told["records"]:
        if r["fits"] and r["cache_dtype"] == "auto" and r["weight_mode"] == "replicated":
            cut = "tokens cut" if r["context_parallel"] > 1 else "latents cut"
            if r["variant"] == "MLA" and r["context_parallel"] == 1:
                cut = "the whole cache on each"
            row = f"{r['variant']}, {cut}"
            cells[row, shape(r)] = f"{r['us'] / 1e3:.2f}"
            cells[row, "KV bytes per token"] = f"{r['cache_bytes_per_token']:,.0f}"
    columns = ["KV bytes per token", "1 x 32K", "1 x 512K", "32 x 32K"]
    return Table([source], grid("ms a step", cells, columns), gates(source.told["records"]))


@table
def links() -> Table:
    source = newest("links")
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "send")
    lines = [["bytes", *(f"{kind.replace('_', '-')}, us (GB/s)" for kind in kinds)]]
    for r in source.told["rows"]:
        found = [f"{r[kind]['us']:.0f} ({r[kind]['bus_gb_s']:.0f})" for kind in kinds]
        lines.append([f"{r['bytes']:,}", *found])
    return Table([source], lines)


# Training: rows of `mlra benchmark-training`.


def matrix_rate(source: Result) -> str:
    """What MFU is a share of."""
    if "matmul_tflops" not in source.told:
        return ""
    return f"Matrix rate of the run: {source.told['matmul_tflops']:.0f} TFLOP/s."


@table
def training() -> Table:
    source = newest("training")
    rows = {row["case"]: row for row in source.told["rows"]}
    head = ["tokens", "MLA of Megatron, tokens/s", "MFU", "GiB", "MLRA-4, tokens/s", "MFU", "GiB"]
    lines = [[*head, "ratio", "FLOPs allow", "memory"]]
    for name, ours in rows.items():
        _, recipe, _, length = name.split("/")
        mla = rows.get(name.replace("mlra4", "stock-mla", 1))
        if not name.startswith("mlra4/") or mla is None:
            continue
        line = [length if recipe == "bf16" else f"{length}, FP8 {recipe}"]
        for row in (mla, ours):
            line.append(f"{row['tokens_per_second']:,.0f}")
            line += [f"{100 * row['mfu']:.1f} %", f"{row['peak_gib']:.1f}"]
        work = [row["hardware_tflops"] / row["tokens_per_second"] for row in (mla, ours)]
        line.append(f"{ours['tokens_per_second'] / mla['tokens_per_second']:.3f}")
        line.append(f"{work[0] / work[1]:.3f}" if recipe == "bf16" else "")
        lines.append([*line, f"{ours['peak_gib'] / mla['peak_gib']:.2f}x"])
    return Table([source], lines, matrix_rate(source))


def held_memory(piece: str) -> Table:
    """Memory of the GPU that holds most, and speed."""
    source = newest(piece)
    lines = [["", "tokens/s", "activations, GiB", "per layer, MiB", "peak, GiB"]]
    for row in source.told["rows"]:
        stock = row["variant"].startswith("stock")
        layer = row["activations_gib"] * 1024 / row["layers"]
        lines.append(
            [
                "Megatron's MLA" if stock else f"{row['variant']}, {row['form']}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['activations_gib']:.1f}", f"{layer:,.0f}", f"{row['peak_gib']:.1f}",
            ]
        )  # fmt: skip
    return Table([source], lines, matrix_rate(source))


@table
def memory() -> Table:
    return held_memory("memory")


@table
def memory_experts() -> Table:
    return held_memory("memory_experts")


def layout(name: str) -> str:
    """`tp2-head-graphs` -> TP2, `head`, `graphs`; without an axis: one GPU."""
    parts = [part for part in name.split("-") if part]
    axes = [part for part in parts if re.fullmatch(r"[a-z]{2}\d+", part)]
    options = [f"`{part}`" for part in parts if part not in axes]
    return ", ".join([*(map(str.upper, axes) if axes else ["one GPU"]), *options])


def one_gpu(name: str) -> str:
    """The case on one GPU with the same model and options: `...@tp2-head-wide4` -> `...@wide4`."""
    alone, _, cut = name.partition("@")
    same = [part for part in cut.split("-") if part in ("graphs", "wide4", "half")]
    return "@".join([alone, *(["-".join(same)] if same else [])])


@table
def layouts() -> Table:
    """Each case's newest row, beside one GPU's of the same run."""
    found: dict[str, tuple[Result, dict[str, Any]]] = {}
    for result in results("layouts"):
        found |= {row["case"]: (result, row) for row in result.told["rows"]}
    sources = list({source.path: source for source, _ in found.values()}.values())
    head = ["model", "layout", "tokens/s", "of its one GPU's", "MFU", "peak GiB of a GPU"]
    lines = [head + ["commit"] * (len(sources) > 1)]
    models = {"stock-mla": "Megatron's MLA", "mlra4": "MLRA-4", "mlra4_moe_16b": "MLRA-4, 16B MoE"}
    for name, (source, row) in sorted(found.items()):
        alone, _, cut = name.partition("@")
        variant, recipe, *_ = alone.split("/")
        rates = {r["case"]: r["tokens_per_second"] for r in source.told["rows"]}
        one = rates.get(one_gpu(name))
        lines.append(
            [
                models[variant] if recipe == "bf16" else f"{models[variant]}, FP8 {recipe}",
                layout(cut), f"{row['tokens_per_second']:,.0f}",
                f"{row['tokens_per_second'] / one:.2f}" if one else "",
                f"{100 * row['mfu']:.1f} %", f"{row['peak_gib']:.1f}",
                *[source.told["commit"]] * (len(sources) > 1),
            ]
        )  # fmt: skip
    return Table(sources, lines, matrix_rate(sources[-1]))


@table
def layouts_profiled() -> Table:
    source = newest("layouts_profiled")
    keys = ("step_ms", "compute_ms", "communication_ms", "exposed_ms")
    head = ["layout", "tokens/s", "step ms", "computing", "communicating", "of it exposed"]
    lines = [[*head, "GPU idle", "launches"]]
    for r in source.told["rows"]:
        found = r["kernels"]
        times = [f"{found[key]:.0f}" for key in keys]
        lines.append(
            [
                layout(r["case"].partition("@")[2]), f"{r['tokens_per_second']:,.0f}", *times,
                f"{100 * found['idle_share']:.0f} %", f"{found['launches']:,.0f}",
            ]
        )  # fmt: skip
    return Table([source], lines, matrix_rate(source))


@table
def equality() -> Table:
    source = newest("equality")
    # Results that do not tell the number are of 30 steps.
    steps = source.told["cases"]["bf16-one"].get("losses", 30)
    keys = {
        "first_loss": "loss",
        "grad_norm": "gradient norm",
        "worst_gradient": "farthest gradient of a parameter",
        "to_float32": "that to float32",
        "one_gpu_to_float32": "one GPU's to float32",
        "steps": f"losses of {steps} steps",
    }
    models = {"bf16": "", "experts": "experts, ", "fp8": "FP8 (tensorwise), "}
    lines = [["layout", *keys.values()]]
    for name, found in source.told["cases"].items():
        model, _, cut = name.partition("-")
        if cut != "one":
            row = models[model] + layout(cut)
            lines.append([row, *(error(found[key]) for key in keys)])
    return Table([source], lines)


# README.


@table
def summary() -> Table:
    speed, train = newest("decoding"), newest("training")
    kernel = newest("latent_decode", PEERS_GPU)
    vllm = {key: found for key, found in served().items() if key[2:] == DEFAULT}
    lines = [["", "MLRA-4", "MLA", "GQA"], *decoding_rows(speed), *serving_rows(vllm)]
    lines += [*training_rows(train), *attention_rows(kernel)]
    used = [found[0] for key, found in vllm.items() if key[1] != "gla2"]
    sources = {each.path: each for each in (speed, train, kernel, *used)}
    return Table([*sources.values()], lines, peer_note(), brief=True)


def decoding_rows(speed: Result) -> list[list[str]]:
    """Of the project's engine."""
    times = {(r["label"], shape(r)): r["us"] for r in speed.told["records"] if "us" in r}
    lines = []
    for what, where, sizes, gqa in (
        ("one TP4 rank's share without its collectives", "1/4", "1 x 512K", "GQA-8"),
        ("the same", "1/4", "32 x 32K", "GQA-8"),
        ("whole on one GPU", "whole", "1 x 512K", "GQA-6"),
    ):
        found = [times.get((f"{name} {where}", sizes)) for name in ("MLRA-4", "MLA", gqa)]
        texts = [f"{us / 1e3:.2f}" if us else "-" for us in found]
        what = f"ms per token, {what}, {sizes} ({speed.kind})"
        lines.append([what, *texts[:2], f"{texts[2]} ({gqa})"])
    return lines


def serving_rows(vllm: Served) -> list[list[str]]:
    """Steps on every number of GPUs, and a long prompt on one."""
    ranks = sorted({key[0] for key in vllm})
    gpus = " / ".join(map(str, ranks)) + f" {next(iter(vllm.values()))[0].kind}"
    lines = [[f"ms per step, served by vLLM on {gpus}, 32 x 32K"]]
    lines += [["seconds of a 128K prompt, on one of them"]]
    for model, mark in (("mlra4", ""), ("mla", ""), ("gqa6", " (GQA-6)")):
        records = [vllm.get((n, model, *DEFAULT), (None, {}))[1] for n in ranks]
        steps = [{shape(s): s.get("ms") for s in r.get("steps", ())} for r in records]
        times = [found.get("32 x 32K") for found in steps]
        prompt = records[0].get("prompt")
        lines[0].append(" / ".join(f"{ms:.2f}" if ms else "-" for ms in times) + mark)
        lines[1].append(f"{prompt['seconds']:.1f}{mark}" if prompt else "")
    return lines


def training_rows(train: Result) -> list[list[str]]:
    """In bf16 and FP8."""
    rates = {row["case"]: f"{row['tokens_per_second'] / 1e3:.1f}k" for row in train.told["rows"]}
    lines = []
    for what, cases in (
        ("at 2K / 8K", ("bf16/auto/2048", "bf16/auto/8192")),
        ("in FP8 at 2K", ("tensorwise/auto/2048",)),
    ):
        found = [" / ".join(rates[f"{m}/{c}"] for c in cases) for m in ("mlra4", "stock-mla")]
        what = f"training, tokens/s of a {train.told['num_layers']}-layer cut {what} ({train.kind})"
        lines.append([what, found[0], f"{found[1]} (Megatron's own)", ""])
    return lines


def attention_rows(kernel: Result) -> list[list[str]]:
    """The decoding kernel alone, and FlashAttention 3."""
    sizes, models = ("1 x 512K", "128 x 4K"), ("MLRA-4/TP4", "MLA")
    ours = [" / ".join(f"{kernel_times(m, PEERS_GPU)[s]['us']:.1f}" for s in sizes) for m in models]
    peers = [fa3("us", models[0]), fa3("us", models[1]), fa3("gqa8_tp8_us", models[0])]
    theirs = [" / ".join(peer[s] for s in sizes) for peer in peers]
    what = f"us, attention of 64 heads alone, {' / '.join(sizes)} ({kernel.kind})"
    peer = f"the same by FA3 ({newest('flash_attention_3').kind})"
    return [[what, *ours, ""], [peer, *theirs[:2], f"{theirs[2]} (GQA-8 at TP8)"]]
