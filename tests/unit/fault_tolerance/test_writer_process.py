"""A writer that another process forked ends with its rank, in real processes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from support.runs import runs_still

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
