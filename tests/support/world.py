"""Real process groups on one machine: forks a world of gloo ranks from a process that has imported
Megatron.

Importing Megatron takes seconds; forking after the import lets many small worlds share one import.
The parent must never have run a torch operation on several threads: threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from megatron_mlra.launch.ports import reserve_port


def run_world(size: int, work: Callable[[int], None], folder: Path, timeout: float = 300.0) -> None:
    """Run `work(rank)` in `size` forked processes that form one gloo world.

    Raises:
        RuntimeError: with the traceback of the first rank that failed, or for a timeout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # Garbage collection in a rank would touch, and so copy, all memory shared with this process.
    gc.collect()
    gc.freeze()
    ranks: dict[int, int] = {}
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os._exit(_be_rank(rank, size, work, folder))
        ranks[pid] = rank
    deadline = time.monotonic() + timeout
    failed = None
    while ranks and failed is None:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = ranks.pop(pid)
            _kill_group(pid)
            if status:
                failed = f"rank {rank} of {size} failed:\n{_error(folder, rank)}"
        elif time.monotonic() > deadline:
            failed = f"a world of {size} ranks did not finish in {timeout:.0f} s"
        else:
            time.sleep(0.02)
    for pid in ranks:
        _kill_group(pid)
        os.kill(pid, signal.SIGKILL)  # a rank killed before it had a group of its own
        os.waitpid(pid, 0)
    if failed is not None:
        raise RuntimeError(failed)


def launch(size: int, work: Callable[[], int | None], folder: Path) -> None:
    """Run `work` in `size` forked processes with the environment of a launcher, and nothing more.

    Raises:
        RuntimeError: with the traceback of a rank that failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    gc.freeze()
    kept = reserve_port()  # until the last rank has ended, since all inherit it
    port = kept.getsockname()[1]
    ranks = []
    for rank in range(size):
        if pid := os.fork():
            ranks.append(pid)
            continue
        os.setsid()
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        code = 70
        try:
            code = work() or 0
        except BaseException:
            (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    codes = []
    for pid in ranks:
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        _kill_group(pid)
    for rank, code in enumerate(codes):
        if code == 70 or code < 0:
            raise RuntimeError(f"rank {rank} of {size} failed:\n{_error(folder, rank)}")


def _kill_group(pid: int) -> None:
    """End a rank with the helpers it started: checkpoint writers outlive a rank that exits."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _error(folder: Path, rank: int) -> str:
    path = folder / f"error-{rank}.txt"
    return path.read_text() if path.exists() else "it left no traceback (killed?)"


def _be_rank(rank: int, size: int, work: Callable[[int], None], folder: Path) -> int:
    import torch

    try:
        torch.set_num_threads(1)
        store = torch.distributed.FileStore(str(folder / "store"), size)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
        work(rank)
        torch.distributed.barrier()
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        return 1
    return 0
