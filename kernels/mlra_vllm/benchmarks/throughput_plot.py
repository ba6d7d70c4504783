"""The bar plot of throughput.py: new tokens per second by workload and model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = {"mlra4": "MLRA-4", "mla": "MLA", "gla2": "GLA-2", "gqa6": "GQA-6"}
COLOURS = {"mlra4": "#0b6fb8", "mla": "#c8501e", "gla2": "#2e8b3d", "gqa6": "#7a7a7a"}
"""Those of the project's other figures."""
K = 1024


def read(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Records of a file, and what it tells besides: a list of records, or an object of
    examples/measure/measure.py, which has them as `records`.

    Raises:
        ValueError: the file cannot be read or holds something else; one line that names it.
    """
    try:
        told = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON file ({error}); give what --json wrote") from None
    records = told.get("records") if isinstance(told, dict) else told
    wanted = {"model": str, "tp": int, "requests": int, "in": int, "out": int}
    for record in records if isinstance(records, list) else [None]:
        if isinstance(record, dict) and all(
            isinstance(record.get(key), kind) for key, kind in wanted.items()
        ):
            rate = record.get("new_tokens_per_s", 0)
            if isinstance(rate, int | float) and 0 <= rate < float("inf"):
                continue
        raise ValueError(f"{file} has no records of throughput; give what --json wrote")
    return records, told if isinstance(told, dict) else {}


def source(about: dict[str, Any]) -> str:
    """GPU, versions and commit, as far as they are known."""
    gpu, count = about.get("gpu"), about.get("gpus") or 1
    facts = [f"{count} x {gpu}" if count != 1 else f"{gpu}"] if gpu else []
    known = {"vllm": "vLLM", "torch": "torch", "commit": "commit"}
    facts += [f"{name} {about[key]}" for key, name in known.items() if about.get(key)]
    return ", ".join(facts)


def workload(record: dict[str, Any]) -> str:
    """1,000 requests at once, 1K tokens in, 256 out."""
    given = record["in"]
    given = f"{given // K}K" if given % K == 0 else f"{given:,}"
    return f"{record['requests']:,} requests at once\n{given} tokens in, {record['out']:,} out each"


def plot(records: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    """Draw a panel for each workload with a bar for each model; records with an `error` are left
    out. Rates of workloads are far apart, so each panel has its own axis.

    Args:
        about: `gpu`, `gpus`, `vllm`, `torch` and `commit`, as far as they are known.

    Raises:
        ValueError: no record has a rate.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record.get("new_tokens_per_s"):
            groups.setdefault(workload(record), []).append(record)
    if not groups:
        raise ValueError(f"{path} is not drawn: no record has new tokens per second")
    figure, (panels,) = plt.subplots(
        1, len(groups), figsize=(12, 7), layout="constrained", squeeze=False
    )
    for axes, (name, group) in zip(panels, groups.items(), strict=True):
        rates = [record["new_tokens_per_s"] for record in group]
        colours = [COLOURS.get(record["model"], "#1b1b1b") for record in group]
        bars = axes.bar(range(len(group)), rates, 0.65, color=colours)
        axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3, size=15, weight="bold")
        axes.set_xticks(range(len(group)), [_label(record) for record in group], size=14)
        axes.set_title(name, loc="left", size=14)
        axes.set_ylim(0, 1.1 * max(rates))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.tick_params(axis="y", labelsize=11)
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("new tokens per second, higher is better", size=13)
    title = "New tokens per second in vLLM: models of 2.9 B parameters, random weights"
    figure.suptitle(
        "\n".join(filter(None, (title, source(about)))), x=0.01, ha="left", size=15, weight="bold"
    )
    figure.savefig(path, format="png", dpi=100)
    plt.close(figure)


def _label(record: dict[str, Any]) -> str:
    ranks = f"\n{record['tp']} GPUs" if record["tp"] > 1 else ""
    return NAMES.get(record["model"], record["model"]) + ranks
