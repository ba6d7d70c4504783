"""Tables of the benchmark's records, in Markdown."""

from __future__ import annotations

from typing import Any

K = 1024
ROWS = 24
"""Most kernels, and most functions, in the table of a profile."""


def table(records: list[dict[str, Any]]) -> str:
    """One row per model: ms a step (of it the graph, and the host's Python of the slowest rank)."""
    cases = list(
        dict.fromkeys(
            (s["batch"], s["context"]) for record in records for s in record.get("steps", ())
        )
    )
    names = [f"{batch} x {context // K}K" for batch, context in cases]
    head = ["| model, runner, tp", *names, "graphs", "all-reduce", "tokens/GiB"]
    lines = [" | ".join([*head, "prompt s", "out/s |"]), "|---" * (len(head) + 2) + "|"]
    for record in records:
        found = {(s["batch"], s["context"]): s for s in record.get("steps", ())}
        cells = [f"| {record['model']}, {record['model_runner']}, {record['tp']}"]
        cells += [_step(found.get(key, {})) for key in cases]
        cells += [record.get("graphs", ""), record.get("all_reduce") or ""]
        cells.append(f"{record['tokens_per_gib']:,}" if "tokens_per_gib" in record else "")
        cells.append(f"{record['prompt']['seconds']:.2f}" if "prompt" in record else "")
        speed = record.get("throughput")
        cells.append(f"{speed['new_tokens_per_s']:.0f} |" if speed else " |")
        if "error" in record:
            cells[-1] = f"{record['error']} |"
        lines.append(" | ".join(cells))
    return "\n".join(lines)


def _step(step: dict[str, Any]) -> str:
    if "ms" not in step:
        return step.get("error", "")
    graph = f"{step['graph_ms']:.2f}" if step.get("graph_ms") else "no graph"
    host = max((ms for ms in step.get("host_ms_by_rank", ()) if ms), default=0)
    return f"{step['ms']:.2f} ({graph}, {host:.2f})"


def profile_table(record: dict[str, Any]) -> str:
    """The longest kernels of a decoding step on the first rank, and functions of its worker."""
    told = record["profile"]
    first, python = told["kernels"][0], told["python"]
    where = f"{record['model']}, tp {record['tp']}, {told['batch']} x {told['context'] // K}K"
    if "error" in first:
        lines = [f"{where}: no kernels: {first['error']}"]
    else:
        total = sum(us for _, _, us in first["kernels"])
        sums = [f"{rank.get('all_reduce_us', 0):.0f}" for rank in told["kernels"]]
        lines = [
            f"{where}: {first['step_us']:.0f} us a step, {total:.0f} us of kernels,"
            f" {first['idle_us']:.0f} us idle in {first['gaps']:.0f} gaps of 1 us and more,"
            f" all-reduce by rank {', '.join(sums)} us",
            "| us a step | calls | us a call | kernel |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {us:.1f} | {calls:.1f} | {us / calls:.2f} | {name[:100]} |"
            for name, calls, us in first["kernels"][:ROWS]
        ]
    if "error" in python:
        return "\n".join([*lines, f"no functions: {python['error']}"])
    lines += ["| host us a step | own us | calls | function |", "|---|---|---|---|"]
    lines += [
        f"| {whole:.0f} | {own:.0f} | {calls:.1f} | {name} |"
        for name, calls, own, whole in python[:ROWS]
    ]
    return "\n".join(lines)
