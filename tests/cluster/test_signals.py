"""What a scheduler does to a job, in every phase of it: the job saves where a step had begun, ends
or goes on as was asked, and its output says which."""

from __future__ import annotations

import os
import re
import signal
import sys
import time

import pytest

from megatron_mlra.fault_tolerance.integrity import check_complete
from support.cluster_jobs import LIVES, ONE, PAIR, Cluster

pytestmark = pytest.mark.cluster


def saved_by_signal(said: str) -> list[int]:
    """Steps after which a start was stopped and saved."""
    return [
        int(step) for step in re.findall(r"stopped after step (\d+) by .*, which is saved", said)
    ]


def time_limit(cluster: Cluster) -> None:
    """The warning before the limit: saved, requeued, continued. The limit itself: the same."""
    job = cluster.submit("limit", *LIVES, options=(*PAIR, "--time", 30))
    job.wait_for(r"^step 3/")
    job.scontrol("update", "JobId", "JOB", "TimeLimit=9")
    job.wait_for(r"^slurm.sh: ended with 75 at step \d+; requeueing")
    (step,) = saved_by_signal(job.said)
    assert job.saved_step() == step
    check_complete(job.save / f"iter_{step:07d}")
    assert job.said.count("the time is nearly up; saving, then requeueing") == 1
    job.wait("requeued", lambda: job.fields()["Restarts"] == "1")
    job.scontrol("update", "JobId", "JOB", "TimeLimit=30")
    job.wait_for(rf"^continuing after step {step:,} ")
    job.wait_for(rf"^step {step + 1:,}/")
    job.scontrol("update", "JobId", "JOB", "TimeLimit=1")
    job.wait("requeued", lambda: job.fields()["Restarts"] == "2")
    job.wait("saved twice", lambda: len(saved_by_signal(job.said)) == 2)
    # Before it starts again, perhaps before its script has ended: nothing revives it.
    job.cancel()
    assert job.end() == "CANCELLED"
    time.sleep(15)
    assert job.fields()["JobState"] == "CANCELLED"
    assert saved_by_signal(job.said)[1] == job.saved_step() > step


def one_node_then_requeue_then_cancel(cluster: Cluster) -> None:
    """SIGTERM to one node in a step; scontrol requeue in a step; scancel in a step."""
    job = cluster.submit("steps", *LIVES, options=PAIR)
    job.wait_for(r"^step 3/")
    (launcher,) = job.processes(job.hosts()[1], "megatron_mlra.launch")
    os.kill(launcher, signal.SIGTERM)
    job.wait_for(r"^slurm.sh: ended with 75 at step \d+; requeueing")
    (first,) = saved_by_signal(job.said)

    job.wait_for(rf"^step {first + 2:,}/")
    job.scontrol("requeue", "JOB")
    job.wait_for(r"^slurm.sh: SLURM requeues this job; saving first")
    job.wait_for(r"^slurm.sh: stopped at step \d+; SLURM starts this job again")
    second = saved_by_signal(job.said)[-1]
    assert second > first and job.saved_step() == second

    job.wait_for(rf"^step {second + 2:,}/")
    job.cancel()
    assert job.end() == "CANCELLED"
    job.wait_for(r"^slurm.sh: ended by SLURM at step \d+; sbatch again to go on")
    third = saved_by_signal(job.said)[-1]
    assert third > second and job.saved_step() == third
    check_complete(job.save / f"iter_{third:07d}")
    assert job.fields()["Restarts"] == "2" and "restart 1 of" not in job.said


def cancel_at_start(cluster: Cluster) -> None:
    """scancel while the ranks import: no rank is started again, the job is not revived."""
    cold = f"--export=ALL,PYTHON={sys.executable}"  # which has all of it to import
    job = cluster.submit("start", *LIVES, options=(*PAIR, cold))
    job.wait_running()
    host = job.hosts()[0]
    job.wait("starting its rank", lambda: len(job.processes(host, "pretrain_mlra.py")) > 1)
    job.cancel()
    assert job.end() == "CANCELLED"
    said = job.said
    assert "slurm.sh: SLURM ends this job (scancel)" in said
    assert "restart 1 of" not in said and "Traceback" not in said
    assert not list(job.save.glob("iter_*"))
    assert job.fields()["Restarts"] == "0"


def cancel_in_a_save(cluster: Cluster) -> None:
    """scancel while a checkpoint is written: it is finished, then that of the step is written."""
    # Mostly embeddings: a checkpoint of some 200 MB behind a step of a moment.
    wide = ("--padded-vocab-size", 131072, "--hidden-size", 128)
    flags = (*LIVES[:-1], 1, *wide, "--keep-last", 2)
    job = cluster.submit("save", *flags, options=ONE)
    job.wait_for(r"^saved step 2 ")

    def saving() -> bool:
        folders = sorted(job.save.glob("iter_*"))
        return bool(folders) and not (folders[-1] / "metadata.json").exists()

    job.wait("in a save", saving)
    job.cancel()
    assert job.end() == "CANCELLED"
    (step,) = saved_by_signal(job.said)
    assert job.saved_step() == step
    check_complete(job.save / f"iter_{step:07d}")
    assert job.fields()["Restarts"] == "0"


def preempted(cluster: Cluster) -> None:
    """A job of higher priority takes the node: SIGTERM to the step alone, then the node is gone."""
    job = cluster.submit("preempted", *LIVES, options=ONE)
    job.wait_for(r"^step 3/")
    (host,) = job.hosts()
    urgent = ("sbatch", "--partition", "urgent", "--nodelist", host, "--exclusive", "--output")
    cluster.on("head", *urgent, "/dev/null", "--wrap", "sleep 2")
    job.wait_for(r"^slurm.sh: ended with 75 at step \d+; requeueing")
    (step,) = saved_by_signal(job.said)
    job.wait_for(rf"^continuing after step {step:,} ")
    job.wait_for(rf"^step {step + 1:,}/")
    job.cancel()
    assert job.end() == "CANCELLED"


def refused(cluster: Cluster) -> None:
    """Four processes for four GPUs; what they refuse is neither restarted nor requeued."""
    eight = ("--tensor-model-parallel-size", 4, "--context-parallel-size", 2)
    job = cluster.submit("refused", *eight, options=("--nodes", 1, "--gpus-per-node", 4))
    assert job.end(300) == "FAILED"
    assert "2 needs a multiple of 8 processes and there are 4" in job.said
    assert job.said.count("needs a multiple") == 1 and "restart 1 of" not in job.said
    assert "the command line or the input was refused" in job.said
    fields = job.fields()
    assert (fields["Restarts"], fields["ExitCode"]) == ("0", "2:0")


def typo(cluster: Cluster) -> None:
    """A typo in the preset's name ends the job at once."""
    job = cluster.submit("typo", options=ONE, preset="mlra4_7bb")
    assert job.end(300) == "FAILED"
    assert "error: there is no preset megatron_mlra/presets/mlra4_7bb.yaml" in job.said
    fields = job.fields()
    assert (fields["Restarts"], fields["ExitCode"]) == ("0", "2:0")


def hostile_guard(cluster: Cluster) -> None:
    """Code in the crash-loop guard's file is text."""
    save = cluster.folder / "work" / "hostile"
    save.mkdir()
    code = f"a[$(touch${{IFS}}{save}/ran)]"
    (save / "starts_without_progress.txt").write_text(f"none {code}\n")
    (save / "latest_checkpointed_iteration.txt").write_text(f"{code}\n")
    job = cluster.submit("hostile", options=ONE, preset="mlra4_7bb")
    assert job.end(300) == "FAILED"
    assert not (save / "ran").exists()


def crash_loop(cluster: Cluster) -> None:
    """Starts that crash without a new checkpoint: requeued twice, then the job stays down."""
    save = cluster.folder / "work" / "crashes"
    save.mkdir()
    # Crashes before the newest checkpoint do not count.
    (save / "starts_without_progress.txt").write_text("4 2\n")
    (save / "latest_checkpointed_iteration.txt").write_text("5\n")
    crashes = "--export=ALL,PYTHON=/bin/false,MOST_CRASHES=2"
    job = cluster.submit("crashes", options=(*ONE, crashes))
    assert job.end(300) == "FAILED"
    assert job.said.count("slurm.sh: ended with 1 at step 5; requeueing") == 2
    line = "error: 2 starts in a row made no progress beyond step 5; look at crashes, then remove"
    assert job.said.count(f"{line} crashes/starts_without_progress.txt") == 1
    fields = job.fields()
    assert (fields["Restarts"], fields["ExitCode"]) == ("2", "2:0")


def array(cluster: Cluster) -> None:
    """A task of an array is started again; one of them has the array's own number."""
    work = cluster.folder / "work"
    python = work / "python-of-array"
    ends = '[ "$2" != -c ] && [ $SLURM_ARRAY_TASK_ID = 0 ] || exit 1'
    python.write_text(f"#!/bin/sh\n{ends}\nexec sleep 300\n")
    python.chmod(0o755)
    tasks = ("--array", "0-1", "--output", work / "array-%a.out")
    # A part of the environment only, which is srun's then too.
    options = (*ONE, *tasks, f"--export=PYTHON={python},MOST_CRASHES=2")
    job = cluster.submit("array", options=options)
    crashed = work / "array-1.out"
    said = "slurm.sh: ended with 1 at step none; requeueing"
    job.wait("crashed", lambda: crashed.exists() and said in crashed.read_text())
    job.wait("down", lambda: "starts in a row made no progress" in crashed.read_text())
    assert "requeue" not in (work / "array-0.out").read_text()


CASES = [
    time_limit,
    one_node_then_requeue_then_cancel,
    cancel_at_start,
    cancel_in_a_save,
    preempted,
    refused,
    typo,
    hostile_guard,
    crash_loop,
    array,
]


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_job(cases, case):
    cases[case].result()
