"""The tables of serving: records of `mlra_vllm.benchmarks.steps` and `.throughput`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from measured import Cells, Result, Table, grid, newest, results, shape, size, table
from mlra_vllm.benchmarks.throughput_plot import NAMES as SERVED

PER_GIB, PROMPT = "cached tokens per GiB", "prompt of 128K tokens, s"
K = 1024
DEFAULT = ("auto", 2, "auto")
"""The last three of a key of `served` for vLLM as it comes."""
Served = dict[tuple[int, str, str, int, str], tuple[Result, dict[str, Any]]]


def served() -> Served:
    """(Ranks, model, dtype of the cache, runner, who multiplies) -> the newest record that has
    steps. Records that do not say who multiplies are of the default of their time."""
    found: Served = {}
    for result in results():
        for r in result.told.get("records", ()) if result.piece.startswith("serving") else ():
            if r.get("steps") and "model" in r:
                key = r["tp"], r["model"], r["kv_cache_dtype"], r["model_runner"]
                found[*key, r.get("products", "auto")] = result, r
    return found


def _distinct(found: Iterable[tuple[Result, dict[str, Any]]]) -> list[Result]:
    """The results of records, each once."""
    return list({result.path: result for result, _ in found}.values())


def served_table(rows: dict[str, tuple[Result, dict[str, Any]]], columns: list[str]) -> Table:
    """A row for each record, with its commit if there are several."""
    cells: Cells = {}
    for row, (source, r) in rows.items():
        for s in r["steps"]:
            if "ms" in s and shape(s) in columns:
                cells[row, shape(s)] = f"{s['ms']:.2f}"
        cells[row, PER_GIB] = f"{r['tokens_per_gib']:,}" if "tokens_per_gib" in r else ""
        if r.get("prompt", {}).get("tokens") == 128 * K:
            cells[row, PROMPT] = f"{r['prompt']['seconds']:.1f}"
        cells[row, "commit"] = source.told["commit"]
    sources = _distinct(rows.values())
    commits = {source.told["commit"] for source in sources}
    return Table(sources, grid("ms a step", cells, columns + ["commit"] * (len(commits) > 1)))


def served_name(key: tuple[int, str, str, int, str]) -> str:
    """A key of `served` in words."""
    ranks, model, dtype, runner, products = key
    return ", ".join(
        [
            SERVED[model], *([f"{ranks} GPUs"] if ranks > 1 else []),
            *(["FP8 cache"] if dtype == "fp8" else []),
            *(["vLLM's older runner"] if runner == 1 else []),
            *(["products by cuBLAS"] if products == "cublas" else []),
        ]
    )  # fmt: skip


@table
def serving() -> Table:
    rows = {served_name(key): found for key, found in served().items() if key[0] == 1}
    engine = newest("serving_engine")
    steps = [
        {**r, "ms": r["us"] / 1e3}
        for r in engine.told["records"]
        if r["label"] == "MLRA-4 whole" and "us" in r
    ]
    (prompt,) = engine.told["prefills"]
    prompt = {"tokens": prompt["context"], "seconds": prompt["seconds"]}
    rows["MLRA-4, the project's engine"] = engine, {"steps": steps, "prompt": prompt}
    columns = ["1 x 2K", "32 x 2K", "32 x 8K", "1 x 128K", "32 x 32K", PER_GIB, PROMPT]
    return served_table(rows, columns)


@table
def serving_gpus() -> Table:
    found = {key: each for key, each in sorted(served().items()) if key[0] > 1}
    rows = {served_name(key): each for key, each in found.items()}
    return served_table(rows, ["1 x 8K", "32 x 8K", "32 x 32K", "1 x 512K"])


def throughput() -> list[tuple[Result, dict[str, Any]]]:
    """The records of each workload, all of the newest result that has the workload."""
    found: dict[tuple, list[tuple[Result, dict[str, Any]]]] = {}
    for result in results("serving_throughput"):
        own: dict[tuple, list[tuple[Result, dict[str, Any]]]] = {}
        for r in result.told["records"]:
            if "error" not in r:
                own.setdefault((r["tp"], r["requests"], r["in"], r["out"]), []).append((result, r))
        found |= own
    return [each for group in found.values() for each in group]


@table
def serving_throughput() -> Table:
    found, cells = throughput(), {}
    for _, r in found:
        row = served_name((r["tp"], r["model"], *DEFAULT))
        work = f"{r['requests']:,} x {size(r['in'])} in, {r['out']} out"
        cells[row, f"{work}: new tokens/s"] = f"{r['new_tokens_per_s']:,.0f}"
        cells[row, f"{work}: s"] = f"{r['seconds']:.1f}"
    return Table(_distinct(found), grid("", cells))
