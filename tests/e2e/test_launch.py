"""The launchers with real processes: signal, save, relaunch; SLURM's requeue and crash-loop guard
against stand-ins of its commands; which checkpoints are kept."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mlra.fault_tolerance.retention import prune
from support import ENV, ROOT
from support.runs import wait_for

LAUNCH = ROOT / "examples" / "launch.sh"


def launch(preset: Path, save: Path, out: Path, ranks: int, *flags: object) -> subprocess.Popen:
    command = ["bash", LAUNCH, preset, save, "--log-interval", 1, *flags]
    env = ENV | {"PYTHON": sys.executable, "GPUS_PER_NODE": str(ranks), "MAX_RESTARTS": "0"}
    with open(out, "w") as file:
        return subprocess.Popen([*map(str, command)], env=env, stdout=file, stderr=file)


def test_a_signal_saves_and_a_relaunch_goes_on(preset, tmp_path):
    save, out = tmp_path / "save", tmp_path / "out.txt"
    run = launch(preset, save, out, 2, "--train-iters", 100000, "--eval-iters", 0)
    wait_for(out, "step 3/", 120)
    run.send_signal(signal.SIGUSR1)
    assert run.wait(120) == 0, out.read_text()
    said = out.read_text()
    assert "by SIGTERM, which is saved" in said
    step = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert step >= 3

    again = tmp_path / "again.txt"
    flags = ("--train-iters", 100000, "--exit-interval", step + 2, "--eval-iters", 0)
    flags += ("--save-interval", 1, "--keep-last", 2)
    assert launch(preset, save, again, 1, *flags).wait(120) == 0, again.read_text()
    said = again.read_text()
    assert f"step {step + 1}/" in said and f"step {step}/" not in said
    kept = tmp_path / "kept"
    steps = sorted(path.name for path in save.glob("iter_*"))
    shutil.copytree(save, kept)
    newest = int((kept / "latest_checkpointed_iteration.txt").read_text())

    # The newest stays whatever is asked; one that is damaged counts for nothing.
    assert steps == [f"iter_{step + 1:07d}", f"iter_{step + 2:07d}"]
    assert prune(kept, 2) == []
    damaged = kept / "iter_0000001"
    shutil.copytree(kept / steps[0], damaged)
    (damaged / ".metadata").unlink()
    deleted = prune(kept, 1)
    assert deleted == [s for s in sorted((int(n[5:]) for n in steps), reverse=True) if s < newest]
    assert {path.name for path in kept.glob("*iter_*")} == {f"iter_{newest:07d}", damaged.name}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["mlra4_7b"], "usage: examples/launch.sh"),
        (["nothing", "runs/x"], "there is no preset examples/configs/nothing.yaml"),
    ],
)
def test_launch_errors_are_one_line(argv, message):
    done = subprocess.run(["bash", LAUNCH, *argv], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    env = os.environ | {"NODES": "2"}
    done = subprocess.run(["bash", LAUNCH, "debug", "x"], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "set RDZV_ENDPOINT" in done.stderr


def slurm(folder: Path, srun: str) -> tuple[subprocess.Popen, Path]:
    """The batch script with stand-ins for SLURM's commands, and what scontrol was told."""
    commands, calls = folder / "bin", folder / "calls.txt"
    commands.mkdir(exist_ok=True)
    for name, text in {"srun": srun, "scontrol": f'echo "$@" >>{calls}'}.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (commands / name).chmod(0o755)
    env = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    env |= {"SLURM_SUBMIT_DIR": str(ROOT)}
    script = ["bash", str(ROOT / "examples" / "slurm.sh"), "debug", "data", str(folder / "save")]
    return subprocess.Popen(script, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE), calls


def test_slurm_saves_and_requeues_before_its_limit(tmp_path):
    srun = f"trap 'touch {tmp_path}/saved; exit 0' TERM; touch {tmp_path}/up; sleep 60 & wait"
    job, calls = slurm(tmp_path, srun)
    while not (tmp_path / "up").exists():
        assert job.poll() is None
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0
    assert (tmp_path / "saved").exists()
    assert calls.read_text() == "requeue 7\n"


def test_slurm_stays_down_after_crashes_without_progress(tmp_path):
    for _ in range(3):
        job, calls = slurm(tmp_path, "exit 1")
        assert job.wait(20) == 0
    assert calls.read_text() == "requeue 7\n" * 3
    job, _ = slurm(tmp_path, "exit 1")
    assert job.wait(20) == 2
    assert b"3 starts in a row made no progress" in job.stderr.read()
    # A new checkpoint makes the count start anew, and a finished run leaves none behind.
    (tmp_path / "save" / "latest_checkpointed_iteration.txt").write_text("500")
    job, calls = slurm(tmp_path, "exit 0")
    assert job.wait(20) == 0
    assert calls.read_text() == "requeue 7\n" * 3
    assert not (tmp_path / "save" / "starts_without_progress.txt").exists()
