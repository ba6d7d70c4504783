"""What a trace of training steps says: is the GPU busy, and is communication hidden?

All times are milliseconds of one step.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
GAPS = ((0, 10), (10, 100), (100, float("inf")))
"""Bounds of the classes of gaps between kernels, microseconds."""

SHOWN = 12


def read(trace: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace, which may be gzipped."""
    data = trace.read_bytes()
    return json.loads(gzip.decompress(data) if trace.suffix == ".gz" else data)["traceEvents"]


def is_communication(name: str) -> bool:
    """Whether a kernel of this name is one of NCCL's, or of user buffers'."""
    return "nccl" in name.lower() or "userbuffers" in name.lower()


def summary(events: Iterable[dict[str, Any]], steps: int, step_ms: float) -> dict[str, Any]:
    """Sums over the device's events of a trace; nothing if there are none.

    Args:
        events: of a Chrome trace: `ts` and `dur` in microseconds.
        steps: in the trace.
        step_ms: of a step that ran without the profiler.

    Returns:
        `busy_ms`: any kernel runs; `compute_ms`: one that computes; `communication_ms`: one that
        communicates, its wait for the other ranks included; `exposed_ms`: of these, while none
        computes; `idle_ms`: none runs, in the traced steps; `idle_share`: of a step without the
        profiler; `launches`; `gaps`: count and sum by length; `kernels`: time, count and name of
        the longest, and `collectives`, all.
    """
    on_device = [e for e in events if e.get("cat") in ON_DEVICE and "dur" in e]
    if not on_device:
        return {}
    spans = {True: [], False: []}
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in on_device:
        spans[is_communication(event["name"])].append((event["ts"], event["ts"] + event["dur"]))
        by_name[event["name"]].append(event["dur"])
    merged = _merge(spans[True] + spans[False])
    busy, compute, communication = (
        _length(_merge(part)) for part in (merged, spans[False], spans[True])
    )
    between = [b[0] - a[1] for a, b in itertools.pairwise(merged)]
    unit = 1e-3 / steps
    rows = sorted(((sum(times), len(times), name) for name, times in by_name.items()), reverse=True)
    rows = [(total * unit, count / steps, name) for total, count, name in rows]
    return {
        "step_ms": step_ms,
        "traced_ms": (merged[-1][1] - merged[0][0]) * unit,
        "busy_ms": busy * unit,
        "compute_ms": compute * unit,
        "communication_ms": communication * unit,
        "exposed_ms": (busy - compute) * unit,
        "idle_ms": sum(between) * unit,
        "idle_share": 1 - busy * unit / step_ms,
        "launches": len(on_device) / steps,
        "gaps": [
            {"from_us": low, "count": len(inside) / steps, "ms": sum(inside) * unit}
            for low, high in GAPS
            for inside in [[gap for gap in between if low <= gap < high]]
        ],
        "kernels": rows[:SHOWN],
        "collectives": [row for row in rows if is_communication(row[2])],
    }


def text(found: dict[str, Any]) -> str:
    """A summary as lines of text."""
    bound = "waits for the host (or a peer)" if found["idle_share"] > 0.1 else "is kept busy"
    lines = [
        f"a step of {found['step_ms']:.1f} ms ({found['traced_ms']:.1f} when traced): the GPU"
        f" {bound}: idle {found['idle_share']:.0%} of it, {found['launches']:.0f} launches",
        f"compute {found['compute_ms']:.1f} ms, communication {found['communication_ms']:.1f} ms,"
        f" of it exposed {found['exposed_ms']:.1f} ms",
        "gaps: "
        + ", ".join(
            f"{g['count']:.0f} of {g['from_us']}+ us ({g['ms']:.1f} ms)" for g in found["gaps"]
        ),
    ]
    for title in ("kernels", "collectives"):
        lines.append(f"{title}, ms and launches of a step:")
        lines += [f"{ms:9.2f} {count:7.0f}  {short_name(name)}" for ms, count, name in found[title]]
    return "\n".join(lines) + "\n"


def short_name(name: str) -> str:
    """A kernel's name without template arguments, return type, parameters and unnamed spaces."""
    named = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.sub(r"<.*|\(.*", "", named)[:90].strip() or name[:90]


def _merge(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans that do not overlap, in order, with the same union."""
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def _length(spans: list[tuple[float, float]]) -> float:
    return sum(stop - start for start, stop in spans)
