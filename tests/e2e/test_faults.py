"""What goes wrong in a long run, done to real processes: the run continues, or names the cause."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mlra.checkpoint.files.manifest import MANIFEST
from megatron_mlra.fault_tolerance.checksums import damage
from megatron_mlra.fault_tolerance.integrity import check_complete
from megatron_mlra.fault_tolerance.saved_steps import latest_step
from support import ENV, ROOT
from support.disks import disk
from support.runs import Run, wait_for, wait_for_end


def flip_a_byte(path: Path) -> None:
    """Change one byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def save(whole, tmp_path):
    """A copy of the uninterrupted run's checkpoints, of steps 4 and 8."""
    shutil.copytree(whole.folder / "save", tmp_path / "save")
    shutil.rmtree(tmp_path / "save" / "tensorboard")
    return tmp_path / "save"


def test_checksums_are_kept_and_match(whole):
    for step in (4, 8):
        folder = whole.folder / f"save/iter_{step:07d}"
        assert (folder / MANIFEST).is_file()
        assert damage(folder) is None
        assert not list(folder.glob("*.sha256")) + list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_corrupted_file_is_found_and_the_checkpoint_before_used(entry, preset, whole, save, name):
    flip_a_byte(save / "iter_0000008" / name)
    run = entry.run(save.parent, "--config", preset, "--save", save, "--load", save)
    assert (run.code, run.err) == (0, "")
    assert re.search(
        rf"warning: checkpoint {save}/iter_0000008(: | is damaged: ){re.escape(name)} .*\n"
        rf"warning: continuing from the checkpoint before: {save}/iter_0000004\n",
        run.out,
    ), run.out
    assert run.losses == {step: whole.losses[step] for step in (5, 6, 7, 8)}
    assert damage(save / "iter_0000008") is None


def test_a_corrupted_checkpoint_is_not_loaded_when_asked_for(entry, preset, save):
    flip_a_byte(save / "iter_0000008/__0_0.distcp")
    run = entry.run(save.parent, "--config", preset, "--load", save, "--ckpt-step", 8)
    assert run.code == 1
    assert run.err.startswith(
        f"error: checkpoint {save}/iter_0000008 is damaged: __0_0.distcp does not match its"
        " checksum; there is iter_0000004: --ckpt-step names the step to load\n"
    )


def test_all_ranks_share_the_checking(entry, preset, save):
    flip_a_byte(save / "iter_0000008/__0_0.distcp")
    flip_a_byte(save / "iter_0000004/__0_0.distcp")
    run = entry.run(save.parent, "--config", preset, "--load", save, ranks=2)
    assert run.code == 1
    said = "iter_0000008 is damaged: __0_0.distcp does not match its checksum; the 1 earlier ones"
    assert run.err.count(said) == 2


def test_a_tracker_cut_short_is_made_up_for(entry, preset, whole, save):
    (save / "latest_checkpointed_iteration.txt").write_text("")
    shutil.rmtree(save / "iter_0000008")
    run = entry.run(save.parent, "--config", preset, "--save", save, "--load", save)
    assert (run.code, run.err) == (0, "")
    assert run.losses == {step: whole.losses[step] for step in (5, 6, 7, 8)}


def test_asynchronous_checkpoints_hold_the_step_they_name(entry, preset, whole, tmp_path):
    save = tmp_path / "save"
    command = ["--config", preset, "--save", save, "--load", save, "--async-save"]
    first = entry.run(tmp_path, *command, "--save-interval", 2)
    assert (first.code, first.err) == (0, "")
    assert first.losses == whole.losses
    shutil.rmtree(save / "tensorboard")
    for step in (2, 6):
        (save / "latest_checkpointed_iteration.txt").write_text(str(step))
        resumed = entry.run(tmp_path, *command, "--save-interval", 9)
        assert (resumed.code, resumed.err) == (0, "")
        assert resumed.losses == {n: whole.losses[n] for n in range(step + 1, 9)}
        shutil.rmtree(save / "tensorboard")


def test_killed_before_the_first_asynchronous_save(entry, preset, tmp_path):
    save = tmp_path / "save"
    command = ["--config", preset, "--save", save, "--load", save, "--async-save"]
    (pid,) = entry.start(tmp_path, *command, "--log-interval", 1, "--train-iters", 100000)
    wait_for(tmp_path / "stdout-0.txt", "step 1/")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(pid, signal.SIGKILL)
    assert entry.wait(tmp_path, [pid]).code == -signal.SIGKILL
    assert len(children) >= 2  # the results queue, the writer
    wait_for_end(children)


def test_killed_during_an_asynchronous_save(entry, preset, whole, save, tmp_path):
    # The writer of step 8 of rank 1 finds its file held up: a pipe that nobody reads.
    for left in (save / "iter_0000008").iterdir():
        left.unlink()
    (save / "latest_checkpointed_iteration.txt").write_text("4")
    os.mkfifo(save / "iter_0000008/__1_0.distcp")
    command = ["--config", preset, "--save", save, "--load", save, "--async-save"]
    pids = entry.start(tmp_path, *command, ranks=2)
    wait_for(tmp_path / "stdout-1.txt", "saving step 8")
    children = Path(f"/proc/{pids[1]}/task/{pids[1]}/children").read_text().split()
    os.kill(pids[1], signal.SIGKILL)
    assert [entry.wait(tmp_path, [pid]).code for pid in pids] == [1, -signal.SIGKILL]
    assert (tmp_path / "stderr-0.txt").read_text().startswith("error (rank 0): another rank ")
    # No writer goes on behind the back of the next job.
    wait_for_end(children)
    assert latest_step(save) == 4
    check_complete(save / "iter_0000004")
    check_a_restart(entry, tmp_path, command, whole, save)


def check_a_restart(entry, folder: Path, command: list, whole: Run, save: Path) -> None:
    """The next job goes on from step 4 and ends as the uninterrupted one did."""
    (save / "iter_0000008/__1_0.distcp").unlink()
    shutil.rmtree(save / "tensorboard")
    run = entry.run(folder, *command)
    assert (run.code, run.err) == (0, "")
    assert run.losses == {step: whole.losses[step] for step in (5, 6, 7, 8)}
    assert latest_step(save) == 8
    assert damage(save / "iter_0000008") is None


def kill_writer(rank: int, lock: Path) -> int:
    """Kill the process that writes a rank's checkpoints, the one that holds the run's lock."""
    children = Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
    holding = [
        int(child)
        for child in children
        if str(lock) in [os.path.realpath(fd) for fd in Path(f"/proc/{child}/fd").iterdir()]
    ]
    assert len(holding) == 1, holding
    os.kill(holding[0], signal.SIGKILL)
    return holding[0]


@pytest.mark.parametrize(
    ("when", "flags", "which"),
    [
        ("saving", [], "the checkpoint of step 8 is not complete, that of step 4 is"),
        (
            "between saves",
            ["--save-interval", 9999, "--train-iters", 9999, "--override-opt-param-scheduler"],
            "no checkpoint was being written, that of step 8 is complete",
        ),
    ],
)
def test_a_killed_writer_ends_the_run(entry, preset, whole, save, tmp_path, when, flags, which):
    """Of rank 1, which says so; the other rank is not left waiting, and the run can go on."""
    if when == "saving":
        for left in (save / "iter_0000008").iterdir():
            left.unlink()
        (save / "latest_checkpointed_iteration.txt").write_text("4")
        os.mkfifo(save / "iter_0000008/__1_0.distcp")  # holds the writer up
    command = ["--config", preset, "--save", save, "--load", save, "--async-save"]
    pids = entry.start(tmp_path, *command, *flags, "--hang-timeout-seconds", 20, ranks=2)
    wait_for(tmp_path / "stdout-1.txt", "saving step 8" if when == "saving" else "step 9/")
    writer = kill_writer(pids[1], save / "run.lock")
    wait_for(tmp_path / "stderr-1.txt", "error", 30)
    assert [entry.wait(tmp_path, [pid]).code for pid in pids] == [1, 1]
    assert (tmp_path / "stderr-0.txt").read_text() == ""
    assert (tmp_path / "stderr-1.txt").read_text() == (
        f"error (rank 1): the process that writes rank 1's checkpoints (pid {writer}, host"
        f" {socket.gethostname()}) was killed by SIGKILL, as the kernel does for want of memory;"
        f" {which}; give the job more memory, or each host fewer ranks, and go on with --load"
        f" {save} --save {save}\n"
    )
    assert latest_step(save) == (4 if when == "saving" else 8)
    assert not (save / "run.lock").exists()
    if when == "saving":
        check_a_restart(entry, tmp_path, command, whole, save)


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for two of the tiny model's checkpoints and a half."""
    with disk(tmp_path / "disk", "3600k") as small:
        yield small


@pytest.mark.parametrize("mode", [[], ["--async-save"]], ids=["sync", "async"])
def test_disk_full_during_a_save(entry, preset, whole, small_disk, tmp_path, mode):
    save = small_disk / "save"
    command = ["--config", preset, "--save", save, "--load", save, "--save-interval", 2, *mode]
    command += ["--tensorboard-dir", tmp_path / "tensorboard", "--log-interval", 1]
    run = entry.run(tmp_path, *command)
    assert run.code == 1
    said = re.match(
        rf"error: the checkpoint of step (\d) could not be saved to {save}: (\[Errno 28\] )?"
        r"No space left on device.*; that of step (\d) is intact\n",
        run.err,
    )
    assert said, run.err
    failed, intact = int(said[1]), int(said[3])
    # On a busy machine steps 4 and 6 may be written at the same time, and either meet the end.
    assert (failed, intact) in ([(6, 4), (4, 2)] if mode else [(6, 4)])
    assert f"step {failed}/8" in run.out
    assert latest_step(save) == intact
    assert damage(save / f"iter_{intact:07}") is None
    # Room is made, and the run goes on.
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    shutil.rmtree(tmp_path / "tensorboard")
    run = entry.run(tmp_path, *command)
    assert (run.code, run.err) == (0, "")
    assert run.losses == {step: whole.losses[step] for step in range(intact + 1, 9)}


def test_ranks_killed_and_restarted_by_torchrun(preset, warm_python, tmp_path):
    env = ENV | {"PYTHON_EXEC": str(warm_python)}  # what torchrun starts ranks with
    command = [sys.executable, ROOT / "tools/soak.py", "--config", preset, "--work"]
    command += [tmp_path / "soak", "--kills", "1", "--steps", "14"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    result = json.loads((tmp_path / "soak/soak.json").read_text())
    assert (result["kills"], result["steps_that_differ"], result["exit_code"]) == (1, 0, 0)
    assert result["final_loss_killed"] == result["final_loss_alone"]


@pytest.mark.parametrize(
    ("before", "after"), [((4, 1), (2, 1)), ((2, 2), (4, 4))], ids=["DP4-DP2", "TP2-TP4"]
)
def test_another_world_size_continues_the_same_data(entry, preset, tmp_path, before, after):
    save = tmp_path / "save"
    command = ["--config", preset, "--save", save, "--load", save, "--micro-batch-size", 1]
    for (ranks, tp), stop in ((before, 4), (after, 8)):
        layout = ["--tensor-model-parallel-size", tp, "--exit-interval", stop]
        run = entry.run(tmp_path, *command, *layout, ranks=ranks, samples=True)
        assert run.code == 0, run.err
    seen: dict[int, list[int]] = {}
    for path in tmp_path.glob("samples-*.txt"):
        for line in path.read_text().splitlines():
            step, number = map(int, line.split())
            seen.setdefault(step, []).append(number)
    # Four samples a step, each once, in the order of one uninterrupted run.
    assert {step: sorted(numbers) for step, numbers in seen.items()} == {
        step: list(range(4 * (step - 1), 4 * step)) for step in range(1, 9)
    }


def test_an_asynchronous_save_behind_the_loop(preset, tmp_path):
    """Megatron ends the writer with its loop, and starts another for a last step that is no
    multiple of --save-interval. The step is a checkpoint before the test set is scored."""
    command = [sys.executable, ROOT / "pretrain_mlra.py", "--config", preset, "--async-save"]
    command += ["--save", tmp_path / "save", "--save-interval", 3]
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text() == "8"
    assert run.stdout.index("saved step 8 to ") < run.stdout.index("test at step 8: ")


def test_a_writer_without_any_save_ends_with_the_run(warm_python, preset, save, tmp_path):
    """The folder holds the last step already, so that none is made or saved."""
    command = [warm_python, ROOT / "pretrain_mlra.py", "--config", preset, "--async-save"]
    command += ["--save", save, "--load", save, "--eval-iters", "0"]
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert not (save / "run.lock").exists()
