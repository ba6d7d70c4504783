"""A rank's writer and its loaders of data end with the rank, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from megatron_mlra.fault_tolerance import failed_saves, helper_processes
from support.runs import runs_still, wait_for_end

RANK = """
import multiprocessing, os, sys, time
from megatron_mlra.fault_tolerance.writer_process import end_with_rank

def writer(ready):
    end_with_rank(multiprocessing.parent_process().pid)
    ready.put(os.getpid())
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    ready = context.Queue()
    context.Process(target=writer, args=(ready,), daemon=True).start()
    pid = ready.get()
    # A data loader: it has copies of the pipes by which the server would learn of this one's end.
    if os.fork() == 0:
        time.sleep(60)
    print(pid, flush=True)
    time.sleep(600)
"""

LOADS = """
import os, signal, sys, time
from torch.utils.data import DataLoader
from megatron_mlra.fault_tolerance.helper_processes import tied_loaders

def end_rank(_):
    print(os.getpid(), flush=True)
    os.kill(os.getppid(), signal.SIGKILL)
    while os.getppid() == rank:
        time.sleep(0.01)

rank, when = os.getpid(), sys.argv[1]
start = end_rank if when == "after" else None
loader = tied_loaders(DataLoader)([0], num_workers=1, worker_init_fn=start)
if when == "before":
    tied = loader.worker_init_fn
    loader.worker_init_fn = lambda number: (end_rank(number), tied(number))
next(iter(loader))
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_loader_ends_with_a_rank_that_was_killed_as_it_started(tmp_path, when):
    """Before or after it asks to be ended, and always before torch looks at its parent."""
    script = tmp_path / "rank.py"
    script.write_text(LOADS)
    rank = subprocess.Popen([sys.executable, script, when], stdout=subprocess.PIPE, text=True)
    with rank.stdout:
        loader = rank.stdout.readline()
    assert rank.wait() == -signal.SIGKILL
    wait_for_end([loader.strip()])


def test_a_writer_of_a_fork_server_ends_with_its_rank(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    rank = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    writer = int(rank.stdout.readline())
    loaders = Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split()
    rank.kill()
    rank.wait()
    try:
        deadline = time.monotonic() + 60
        while runs_still(writer):
            assert time.monotonic() < deadline, "the writer outlived its rank"
            time.sleep(0.01)
    finally:
        for loader in loaders:
            subprocess.run(["kill", "-9", loader], capture_output=True)


def test_a_rank_waits_for_no_writer_that_was_killed(monkeypatch):
    """Neither as it hands over a save nor for its result; behind the last save, none is missed."""
    for name in ("process", "queue", "preload_q", "comp_q"):
        monkeypatch.setattr(PersistentAsyncCaller, f"_persistent_{name}", None)
    writer = failed_saves.watched(PersistentAsyncCaller._get_process)(0, "forkserver")
    failed_saves.check()
    os.kill(writer.pid, signal.SIGKILL)
    PersistentAsyncCaller._persistent_preload_q.put(0)
    with pytest.raises(failed_saves.HelperEnded):
        PersistentAsyncCaller._persistent_preload_q.join()
    with pytest.raises(failed_saves.HelperEnded):
        PersistentAsyncCaller._persistent_comp_q.get_nowait()
    assert failed_saves.ended() is writer and writer.exitcode == -signal.SIGKILL
    PersistentAsyncCaller._persistent_queue.put("DONE")
    PersistentAsyncCaller._persistent_queue.join()


def test_the_process_of_the_results_is_missed_as_a_writer_is(monkeypatch):
    monkeypatch.setattr(helper_processes, "_manager", None)
    helper_processes.results_queue(frozenset())
    failed_saves.check()
    process = helper_processes.results_process()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert failed_saves.ended() is process
