"""examples/reproduce: how a run's end is read, and what its processes leave."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import measure
from ladder import Ladder
from run_ladder import Job, Runner
from run_results import BEGUN, Corpus, divergence, last_error
from support import ROOT


@pytest.mark.parametrize(
    "line",
    [
        "step 3: the loss is nan on data-parallel rank 0, samples 7; lower --lr, or look",
        "step 3: the loss is NaN on data-parallel rank 0: nan, on data-parallel rank 0",
        "step 3: the loss is infinite on data-parallel rank 0: inf, on data-parallel rank 0",
        "step 3: found NaN in local grad norm for bucket #0 in backward pass: nan, on rank 0",
        "step 3: found Inf in local grad norm for bucket #0 in backward pass: inf, on rank 0",
        "Rank 0, node a, device 0: Unexpected result nan (message='the loss is NaN on rank 0')",
    ],
)
def test_losses_and_gradients_that_are_not_finite_are_divergence(line):
    log = f"has the device\nerror: {line}\nbehind it\n"
    assert divergence(log) == f"error: {line}"
    assert divergence(log.removesuffix("\nbehind it\n")) == f"error: {line}"


@pytest.mark.parametrize(
    "line",
    [
        "[Errno 28] No space left on device: '/home/grad/finance/checkpoint/.metadata'",
        "--gradient-accumulation-fusion needs APEX, see the information of the installation",
        "/data/graduates/nancy/tokens/train.bin does not exist",
    ],
)
def test_other_failures_are_no_divergence(line):
    """A run that fails for a technical reason is made again, and counts for nothing."""
    assert divergence(f"has the device\nerror: {line}\n") is None


def test_the_latest_attempt_says_why_a_run_failed():
    """A log holds all attempts of a run, one behind the other."""
    first = "$ python one_run.py\nhas the device\nerror: step 3: the loss is nan on rank 0\n"
    second = "$ python one_run.py\nTraceback\nImportError: no torch\n"
    assert divergence(first) and divergence(first + second) is None
    assert last_error(first + second) == "ImportError: no torch"
    assert last_error(second + first) == divergence(second + first)


def test_the_last_lines_of_a_job_count(tmp_path: Path, monkeypatch):
    """A job that ends while its log is read has written more than what was read."""
    log = tmp_path / "log.txt"
    log.write_text(f"{BEGUN}\n")

    class Ends:
        """A process that says why it ends after the runner has looked at its log."""

        returncode = 1

        def poll(self) -> int:
            log.write_text(f"{BEGUN}\nerror: step 3: the loss is nan on rank 0\n")
            return self.returncode

    runner = Runner(None, None, tmp_path, [], 0.0, False, False, "")
    told = []

    def end(job: Job, number: int, log: str) -> bool:
        told.append(divergence(log))
        return True

    monkeypatch.setattr(runner, "_ended", end)
    assert runner._reap(0, [Job(None, Ends(), tmp_path, 1.0, 0)]) == 1
    assert told == ["error: step 3: the loss is nan on rank 0"]


def test_a_training_ends_with_the_run_that_started_it(tmp_path):
    """run_ladder.py kills a run that does not stop in time; its training may not keep the GPU."""
    pid = tmp_path / "pid"
    (tmp_path / "pretrain_mlra.py").write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    stage = {"does": "train", "words": [str(pid)], "done": str(tmp_path / "done")}
    code = f"import beyond, pathlib; beyond.ROOT = pathlib.Path({str(tmp_path)!r}); "
    code += f"beyond.Run().work([{stage!r}])"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "examples/reproduce")
    try:
        assert eventually(lambda: pid.is_file() and pid.read_text())
        run.kill()
        run.wait()
        assert eventually(lambda: not Path(f"/proc/{pid.read_text()}").exists())
    finally:
        run.kill()
        with contextlib.suppress(OSError):
            os.kill(int(pid.read_text()), signal.SIGKILL)


def eventually(true: Callable[[], object], seconds: float = 20.0) -> bool:
    """Whether `true` becomes true in time."""
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(found)


def test_tasks_that_are_not_those_of_the_results_are_refused(tmp_path):
    """Before a run, whose result could not stand beside the others."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tmp_path / "tokens.json").write_text('{"sets": {}}')
    (tasks / "cloze.jsonl").write_text("one")
    digest = hashlib.sha256(b"one").hexdigest()
    (tasks / "tasks.json").write_text(json.dumps({"files": {"cloze": {"sha256": digest}}}))
    done = {"id": "a", "data_sha256": {}, "tasks_sha256": {"cloze": digest}}
    Corpus(tmp_path).check([], [done])
    with pytest.raises(ValueError, match=r"the tasks in .* are not those of a"):
        Corpus(tmp_path).check([], [done | {"tasks_sha256": {"cloze": "other"}}])
    (tasks / "cloze.jsonl").write_text("two")
    with pytest.raises(ValueError, match=r"tasks/cloze\.jsonl is not the one of tasks\.json"):
        Corpus(tmp_path).check([], [done])
    (tasks / "cloze.jsonl").unlink()
    with pytest.raises(ValueError, match=r"tasks/cloze\.jsonl is not the one of tasks\.json"):
        Corpus(tmp_path).check([], [done])


def test_tasks_of_other_lengths_are_refused(tmp_path):
    """Before the training of a base, not behind it."""
    (tmp_path / "tasks").mkdir()
    ladder = Ladder(ROOT / "examples/reproduce/ladder.yaml", tmp_path)
    Corpus(tmp_path).check_tasks(ladder)  # none are made yet: runs beyond the loss wait
    names = ["cloze", *(f"long_{n}" for n in (512, 1024, 2048, 4096))]
    told = {"files": {name: {"sha256": ""} for name in names}}
    (tmp_path / "tasks/tasks.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"has no long_8192; run make_tasks\.py --lengths 512 "):
        Corpus(tmp_path).check_tasks(ladder)


def test_a_run_counts_gpus_as_nvidia_smi_does(tmp_path, monkeypatch):
    """CUDA's own order is by speed: index 1 of nvidia-smi may be another of two kinds of GPU."""
    told = {}

    class Started:
        def __init__(self, command, env, **_):
            told.update(env)

    monkeypatch.setattr("run_ladder.subprocess.Popen", Started)
    monkeypatch.setattr(Runner, "flags", lambda *_: [])
    monkeypatch.setattr(Ladder, "base", lambda *_: None)
    ladder = Ladder(ROOT / "examples/reproduce/ladder.yaml", tmp_path)
    runner = Runner(ladder, None, tmp_path, [("1", "L4")], 0.0, False, False, "")
    runner._start(0, ladder.left({})[0], 10, 5, 1.0)
    assert (told["CUDA_VISIBLE_DEVICES"], told["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")


def test_measurements_choose_gpus_by_index_as_the_ladder_does(tmp_path, monkeypatch):
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\nfor n in 0 1 2; do echo $n, NVIDIA H200, 570.1; done\n")
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for chosen, wanted in (("2, 1", ["2", "1"]), ("", []), (None, ["0", "1", "2"])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if chosen is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert [gpu["index"] for gpu in measure.visible_gpus()] == wanted
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5ebe9f43")
    with pytest.raises(ValueError, match="GPU-5ebe9f43 is not one of 0, 1, 2; list GPUs by"):
        measure.visible_gpus()
