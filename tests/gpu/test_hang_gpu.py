"""Who hangs under NCCL: the rank whose GPU has nothing to do, wherever the others' hosts stand.

python -m pytest -m gpu tests/gpu/test_hang_gpu.py

All but the first test need two GPUs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import ROOT
from support.runs import CAPTURED, GET_BATCH, run_to_end

pytestmark = pytest.mark.gpu

ASLEEP = """
import os, time
import pretrain_mlra
pretrain_mlra.has_gpu()
from megatron.training import get_args
import {module} as steps
get_batch = steps.{name}
def slow(*rest):
    if os.environ["RANK"] == "1" and get_args().curr_iteration + 1 == 4:
        time.sleep(600)
    return get_batch(*rest)
steps.{name} = slow
pretrain_mlra.leave(pretrain_mlra.main())
"""


def test_a_gpu_with_queued_work_is_busy(tmp_path):
    from megatron_mlra.fault_tolerance.heartbeat import Watch

    watch = Watch(rank=0, world_size=2, limit=100, folder=tmp_path)
    torch.cuda.synchronize()
    assert not watch._gpu_is_busy()
    torch.cuda._sleep(10**10)
    assert watch._gpu_is_busy()
    torch.cuda.synchronize()
    assert not watch._gpu_is_busy()


def two_ranks(folder: Path) -> subprocess.CompletedProcess:
    """A run of two data-parallel ranks of which one falls asleep before its batch of step 4."""
    module, _, name = GET_BATCH.partition(":")
    (folder / "asleep.py").write_text(ASLEEP.format(module=module, name=name))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", folder / "asleep.py"]
    command += ["--config", "debug", "--mock-data", "--bf16"]
    command += ["--micro-batch-size", "4", "--train-iters", "50", "--eval-iters", "0"]
    command += ["--lr-warmup-iters", "2", "--log-interval", "1"]
    command += ["--save", folder / "save", "--hang-timeout-seconds", "20"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return run_to_end(command, 400, env=os.environ | {"PYTHONPATH": path}, **CAPTURED)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_one_that_waits_for_nccl_is_not_named(tmp_path):
    run = two_ranks(tmp_path)
    assert run.returncode != 0
    named = [line for line in run.stderr.splitlines() if "hangs" in line]
    assert len(named) == 1, run.stderr
    assert re.match(
        r"error: rank 1 \(host \S+, pid \d+, GPU 1\) hangs: alive, but no progress for \d+ s; at"
        r" step 4, loading data, asleep.py:\d+ \(slow\) \(--hang-timeout-seconds 20\)",
        named[0],
    ), named[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_run_whose_collectives_are_in_graphs_ends():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", ROOT / "pretrain_mlra.py", "--config", "debug"]
    command += ["--mock-data", "--bf16", "--tensor-model-parallel-size", "2"]
    command += ["--sequence-parallel", "--cuda-graph-impl", "local", "--te-rng-tracker"]
    command += ["--micro-batch-size", "4", "--train-iters", "8", "--eval-iters", "0"]
    command += ["--lr-warmup-iters", "2", "--log-interval", "1"]
    run = run_to_end(command, 120, **CAPTURED)
    assert run.returncode == 0, run.stderr
    assert "step 8/8" in run.stdout, run.stdout


FAILS = """
import torch, torch.distributed as dist
from megatron_mlra.inference import graphs, world

def step():
    x = torch.ones(8, device="cuda")
    dist.all_reduce(x)
    graph = graphs.keep(torch.cuda.CUDAGraph())
    with torch.cuda.graph(graph):
        dist.all_reduce(x)
    graph.replay()
    raise ValueError("a step failed")

torch.cuda.set_device(world.rank())
try:
    with world.formed(world.meet(dict), "nccl"):
        step()
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_world_whose_collectives_are_in_graphs_ends_with_its_error(tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", tmp_path / "fails.py"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    run = run_to_end(command, 120, env=env, **CAPTURED)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("a step failed") == 2, run.stdout
