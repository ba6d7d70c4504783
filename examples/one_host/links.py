"""How fast the GPUs of one host exchange data: collectives by size, for `mlra plan`'s `--link`.

    torchrun --nproc-per-node 2 examples/one_host/links.py OUT

prints a table and writes OUT/links.json. Without a GPU it rehearses on gloo with small sizes.
Bus bandwidth counts what one GPU must send, so that it compares with the vendor's rate of a link in
one direction: of n ranks 2 (n - 1) / n of an all-reduce's bytes, (n - 1) / n of a gather's or a
reduce-scatter's whole tensor, and all of a message.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "send")
LARGEST = 2**30
SECONDS = 1.0
"""Of one size of one kind, at most."""


def call(kind: str, size: int, device: torch.device) -> tuple[Callable[[], None], float]:
    """The collective of a tensor of `size` bytes in all, and the bytes that one rank must send."""
    n, rank = dist.get_world_size(), dist.get_rank()
    numbers = max(n, size // 2 // n * n)
    whole = torch.ones(numbers, dtype=torch.bfloat16, device=device)
    part = torch.ones(numbers // n, dtype=torch.bfloat16, device=device)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole), 2 * (n - 1) / n * 2 * numbers
    if kind == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part), (n - 1) / n * 2 * numbers
    if kind == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole), (n - 1) / n * 2 * numbers
    other = torch.empty_like(whole)

    def exchange() -> None:
        """To the next rank, from the one before: as pipeline stages in both directions."""
        operations = [
            dist.P2POp(dist.isend, whole, (rank + 1) % n),
            dist.P2POp(dist.irecv, other, (rank - 1) % n),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return exchange, 2.0 * numbers


def seconds(run: Callable[[], None], on_gpu: bool) -> float:
    """Median of batches of calls, on the slowest rank."""

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def batch(count: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(count):
            run()
        wait()
        return (time.perf_counter() - start) / count

    batch(3)
    first = torch.tensor([batch(3)], device="cuda" if on_gpu else "cpu")
    dist.all_reduce(first, dist.ReduceOp.MAX)
    count = max(3, min(50, int(SECONDS / 5 / float(first))))
    times = torch.tensor([median(batch(count) for _ in range(3))], device=first.device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return float(times)


def main(out: Path) -> None:
    """Measure every kind at every size."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda" if on_gpu else "cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=60))
    sizes, size = [], 1024
    while size <= (LARGEST if on_gpu else 2**20):
        sizes.append(size)
        size *= 8
    if on_gpu:
        sizes += [2**25, LARGEST]
    rows = []
    for size in sorted({*sizes}):
        row = {"bytes": size}
        for kind in KINDS:
            run, sent = call(kind, size, device)
            taken = seconds(run, on_gpu)
            row[kind] = {"us": 1e6 * taken, "bus_gb_s": sent / taken / 1e9}
        rows.append(row)
    if dist.get_rank() == 0:
        name = torch.cuda.get_device_name() if on_gpu else "CPU"
        found = {
            "device": name,
            "ranks": dist.get_world_size(),
            "torch": torch.__version__,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
            "rows": rows,
        }
        out.mkdir(parents=True, exist_ok=True)
        (out / "links.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{dist.get_world_size()} x {name}; microseconds (bus GB/s)")
        print("| bytes | " + " | ".join(KINDS) + " |\n|" + "---|" * (1 + len(KINDS)))
        for row in rows:
            cells = [f"{row[k]['us']:.1f} ({row[k]['bus_gb_s']:.1f})" for k in KINDS]
            print(f"| {row['bytes']:,} | " + " | ".join(cells) + " |")
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) != 2 or "RANK" not in os.environ:
        print("error: usage: torchrun --nproc-per-node 2 links.py OUT", file=sys.stderr)
        sys.exit(2)
    main(Path(sys.argv[1]))
