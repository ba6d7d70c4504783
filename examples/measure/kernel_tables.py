"""The tables of the kernels."""

from __future__ import annotations

import re
from typing import Any

from measured import Cells, Result, Table, grid, newest, results, table

OURS = "mlra_kernels"
PEERS_GPU = "H100"
"""On which FlashAttention 3 was measured; the tables beside it are of this GPU."""


def provider(record: dict[str, Any]) -> str:
    """Whose time a record is, as a column is called."""
    return "this project" if record["provider"] == OURS else record["provider"]


def kernel_times(model: str, gpu: str = "") -> dict[str, dict[str, Any]]:
    """Batch and length -> record of the decoding kernel on a model's shape."""
    records = newest("latent_decode", gpu).told["records"]
    return {
        r["shape"].removeprefix(f"{model} "): r
        for r in records
        if r["model"] == model and r["provider"] == OURS
    }


def fa3(key: str, model: str) -> dict[str, str]:
    """Batch and length -> microseconds of FlashAttention 3."""
    records = newest("flash_attention_3").told["records"]
    start = f"{model} "
    return {
        r["shape"].removeprefix(start): f"{r[key]:.1f}"
        for r in records
        if key in r and r["shape"].startswith(start)
    }


def peer_note() -> str:
    """Where FlashAttention 3 was measured."""
    told = newest("flash_attention_3").told
    return f"FA3: {told['what']} (roof {told['read_gb_s']} GB/s)."


@table
def latent_decode() -> Table:
    source = newest("latent_decode")
    models = {"MLRA-4/TP4": "MLRA-4", "MLA": "MLA", "GLA-2/TP2": "GLA-2"}
    cells = {
        (row, name): f"{r['us']:.1f} ({100 * r['share']:.0f} %)"
        for model, name in models.items()
        for row, r in kernel_times(model).items()
    }
    note = f"In brackets the share of the roof at {source.told['read_gb_s']:.0f} GB/s."
    return Table([source], grid("us", cells), note)


@table
def latent_decode_beside_fa3() -> Table:
    source, model = newest("latent_decode", PEERS_GPU), "MLRA-4/TP4"
    keys = {"bar": "bar_us", "FA3": "us", "FA3, GQA-8 at TP8": "gqa8_tp8_us"}
    peers = [fa3(key, model) for key in keys.values()]
    lines = [["batch x length", "us", "share of roof", *keys]]
    for name, r in kernel_times(model, PEERS_GPU).items():
        ours = [f"{r['us']:.1f}", f"{100 * r['share']:.0f} %"]
        lines.append([name, *ours, *(peer.get(name, "") for peer in peers)])
    note = f"The roof is that of {source.told['read_gb_s']:.0f} GB/s. {peer_note()}"
    return Table([source], lines, note)


@table
def latent_decode_models() -> Table:
    cells: Cells = {}
    for model, name in (("MLA", "MLA"), ("GLA-2/TP2", "GLA-2")):
        peer = fa3("us", model)
        for row, r in kernel_times(model, PEERS_GPU).items():
            cells[row, name] = f"{r['us']:.1f}"
            cells[row, f"FA3 on {name}"] = peer.get(row, "")
    return Table([newest("latent_decode", PEERS_GPU)], grid("us", cells), commands=False)


def plain(shape: str) -> str:
    """The shape in bf16 with one query token; shapes of guesses, by their heads, name that q=1."""
    return re.sub(r"q=\d", "q=1", shape) if "heads" in shape else re.sub(r" (fp8|q=\d)", "", shape)


@table
def latent_decode_other() -> Table:
    source = newest("latent_decode")
    times = {r["shape"]: r["us"] for r in source.told["records"]}
    lines = [["shape", "us", "share of roof", "times the plain shape"]]
    for r in source.told["records"]:
        if r["model"] not in ("MLRA-4/TP4", "MLA", "GLA-2/TP2") and r["provider"] == OURS:
            base = plain(r["shape"])
            ratio = f"{r['us'] / times[base]:.2f}" if base in times and base != r["shape"] else ""
            lines.append([r["shape"], f"{r['us']:.1f}", f"{100 * r['share']:.0f} %", ratio])
    return Table([source], lines, commands=False)


@table
def latent_attention() -> Table:
    source = newest("latent_attention")
    lines = [["workload", "forward, ms", "TFLOP/s", "backward, all passes, ms", "TFLOP/s"]]
    for r in source.told["records"]:
        if r.get("provider", OURS) == OURS:
            times = (r[f"{way}_{unit}"] for way in ("forward", "backward") for unit in UNITS)
            lines.append([r["workload"], *(f"{x:.2f}" if x % 1 else f"{x:.0f}" for x in times)])
    return Table([source], lines)


@table
def latent_attention_peers() -> Table:
    source = newest("latent_attention")
    cells = {
        (r["workload"], provider(r)): (
            f"{r['forward_ms']:.2f} / {r['backward_ms']:.2f}"
            f" ({r['forward_tflop_s']} / {r['backward_tflop_s']})"
        )
        for r in source.told["records"]
    }
    return Table([source], grid("forward / backward, ms (TFLOP/s)", cells), commands=False)


@table
def latent_decode_peers() -> Table:
    source = newest("peers")
    cells = {(r["shape"], provider(r)): f"{r['us']:.1f}" for r in source.told["records"]}
    return Table([source], grid("us", cells))


@table
def grouped_decode() -> Table:
    """Each provider's newest times."""
    found: dict[str, Result] = {}
    for result in results("grouped_decode"):
        found |= {r["provider"]: result for r in result.told["records"]}
    cells = {
        (r["shape"], provider(r)): f"{r['us']:.1f}"
        for name, result in found.items()
        for r in result.told["records"]
        if r["provider"] == name
    }
    return Table([*{each.path: each for each in found.values()}.values()], grid("us", cells))


UNITS = ("ms", "tflop_s")
PRODUCTS = {
    "down": "norm, down projection",
    "q up": "norm, query up projection, RoPE",
    "proj": "output projection, residual",
    "fc1": "norm, first half of the MLP, SwiGLU",
    "fc2": "second half, residual",
    "output": "logits",
    "absorb": "W_UK, 24 x 128 x 512",
    "sum": "W_UV, 24 x 512 x 128",
}


@table
def products() -> Table:
    source = newest("products")
    cells: Cells = {}
    for r in source.told["records"]:
        if 1 in r["tp"] and r["tokens"] <= 2:
            row, rows = PRODUCTS[r["product"]], "one row" if r["tokens"] == 1 else "two rows"
            cells[row, "W"] = f"{r['outputs']} x {r['inputs']}" if "outputs" in r else ""
            for name, us in (
                ("cuBLAS", r["cublas_us"]),
                ("ours", r.get("default", r["early"])["us"]),
            ):
                cells[row, f"{name}, {rows}"] = f"{us:.1f} ({100 * r['roof_us'] / us:.0f} %)"
            if r["tokens"] == 1 and "default" in r:
                cells[row, "best cut, one row"] = f"{r['early']['us']:.1f}"
    return Table([source], grid("product", cells))


@table
def one_shot() -> Table:
    source = newest("one_shot")
    names = {
        "nccl": "NCCL and `add_rms_norm`",
        "one-shot": "one-shot",
        "one-shot pdl": "started early",
    }
    cells = {
        (str(r["tokens"]), head): f"{r['us'][way]:.2f}"
        for r in source.told["records"]
        for way, head in names.items()
    }
    return Table([source], grid("tokens", cells))
