"""Hosts that disagree, folders that are not shared, two runs on one folder, a lost tracker file."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_mlra.fault_tolerance.run_lock import NAME
from megatron_mlra.fault_tolerance.saved_steps import latest_step
from support.runs import wait_for

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module", autouse=True)
def _hosts():
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("namespaces cannot be made here")


def refusal(run) -> str:
    """The one line that both hosts end with."""
    assert run.code == 2, run.err
    lines = run.err.splitlines()
    assert len(lines) == 2, run.err
    assert lines[0] == lines[1]
    return lines[0]


def test_hosts_started_with_other_flags(entry, preset, tmp_path):
    hosts = [{"name": "node1"}, {"name": "node2", "argv": ["--num-layers", "3", "--lr", "0.001"]}]
    flags = ["--config", preset, "--save", tmp_path / "save"]
    run = entry.run(tmp_path, *flags, ranks=2, hosts=hosts)
    assert refusal(run) == (
        "error: rank 1 (host node2) differs from rank 0 (host node1) in --lr: 0.001, where rank 0"
        " has 0.002; --num-layers: 3, where rank 0 has 2; start every host with the same command,"
        " code and data"
    )
    assert run.out == ""
    assert not (tmp_path / "save").exists()


def test_hosts_with_other_bytes_behind_the_data_path(entry, preset, corpus, tmp_path):
    other = tmp_path / "other.bin"
    data = bytearray(corpus.with_suffix(".bin").read_bytes())
    data[len(data) // 2 - 64 : len(data) // 2 + 64] = bytes(128)
    other.write_bytes(data)
    hosts = [
        {"name": "node1"},
        {"name": "node2", "mounts": [[str(other), str(corpus.with_suffix(".bin"))]]},
    ]
    line = refusal(entry.run(tmp_path, "--config", preset, ranks=2, hosts=hosts))
    assert re.match(
        r"error: rank 1 \(host node2\) differs from rank 0 \(host node1\) in the content of"
        rf" {corpus}.bin: SHA-256 \w+ of samples, where rank 0 has SHA-256 \w+ of samples; start",
        line,
    ), line


def test_a_save_folder_that_each_host_has_for_itself(entry, preset, tmp_path):
    save, other = tmp_path / "save", tmp_path / "other"
    save.mkdir()
    other.mkdir()
    hosts = [{"name": "node1"}, {"name": "node2", "mounts": [[str(other), str(save)]]}]
    flags = ["--config", preset, "--save", save, "--load", save]
    line = refusal(entry.run(tmp_path, *flags, ranks=2, hosts=hosts))
    assert line == (
        f"error: --save {save} is not shared: rank 1 (host node2) does not see what rank 0 (host"
        " node1) writes there; use a folder that all hosts see"
    )
    assert [*save.iterdir(), *other.iterdir()] == []


@pytest.mark.parametrize("mode", [[], ["--async-save"]], ids=["sync", "async"])
def test_a_mount_that_is_gone_in_mid_run(entry, preset, tmp_path, mode):
    save, other = tmp_path / "save", tmp_path / "other"
    save.mkdir()
    other.mkdir()
    hosts = [{"name": "node1"}, {"name": "node2", "later": [[str(other), str(save)]]}]
    flags = ["--config", preset, "--save", save, "--load", save, *mode]
    flags += ["--tensorboard-dir", tmp_path / "tensorboard"]
    run = entry.run(tmp_path, *flags, ranks=2, hosts=hosts)
    assert run.code == 1
    assert re.search(
        rf"error \(rank 0\): the checkpoint of step 4 could not be saved to {save}: host node1 does"
        r" not see what other ranks wrote: __1_\d.distcp of rank 1 \(host node2\): No such file or"
        r" directory.*; is the folder shared by all hosts\?; there is none earlier\n",
        run.err,
    ), run.err
    assert "saved step" not in run.out
    assert not (save / TRACKER).exists()
    assert not (save / NAME).exists()


def test_two_runs_on_one_folder(entry, preset, tmp_path):
    save, first, second = tmp_path / "save", tmp_path / "first", tmp_path / "second"
    flags = ["--config", preset, "--save", save, "--load", save, "--save-interval", 2]
    endless = ["--train-iters", 100000, "--log-interval", 1]
    pids = entry.start(first, *flags, *endless, ranks=2)
    wait_for(first / "stdout-0.txt", "no GPU found")
    log = save / "megatron.log"
    run = entry.run(second, *flags, *endless)
    assert run.code == 2
    assert re.fullmatch(
        rf"error: --save {save} is in use by another run \(host \S+, pid {pids[0]}, since"
        r" [\d :-]+\), which is alive; end that run or use another --save \(if it is gone for"
        rf" certain, delete {save}/{NAME}\)\n",
        run.err,
    ), run.err
    assert run.out == ""
    assert log.read_text().count("building GPT model") <= 1
    wait_for(first / "stdout-1.txt", "saved step 4")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    entry.wait(first, pids)
    assert (save / NAME).exists()
    after = entry.run(second, *flags, *endless, "--exit-interval", 1)
    assert (after.code, after.err) == (0, "")
    assert "waiting" not in after.out
    assert not (save / NAME).exists()


def test_a_folder_deleted_in_mid_run(entry, preset, tmp_path):
    save = tmp_path / "save"
    flags = ["--config", preset, "--save", save, "--load", save, "--save-interval", 3]
    pids = entry.start(tmp_path, *flags, "--train-iters", 100000, "--log-interval", 1)
    wait_for(tmp_path / "stdout-0.txt", "saved step 3")
    shutil.rmtree(save)
    run = entry.wait(tmp_path, pids)
    assert run.code == 1
    assert re.match(
        rf"error: --save {save} is gone \(deleted, or unmounted\) at step \d+: its checkpoints are"
        r" lost with it \(",
        run.err,
    ), run.err
    assert "Traceback" not in run.err


@pytest.fixture
def save(whole, tmp_path) -> Path:
    """A copy of the uninterrupted run's checkpoints, of steps 4 and 8, without the tracker."""
    shutil.copytree(whole.folder / "save", tmp_path / "save")
    shutil.rmtree(tmp_path / "save" / "tensorboard")
    (tmp_path / "save" / TRACKER).unlink()
    return tmp_path / "save"


def test_a_lost_tracker_is_made_up_for(entry, preset, whole, save, tmp_path):
    shutil.rmtree(save / "iter_0000008")
    (save / "iter_0000006").mkdir()  # the save in which the run was killed
    run = entry.run(tmp_path, "--config", preset, "--save", save, "--load", save)
    assert (run.code, run.err) == (0, "")
    said = f"warning: {save} has no {TRACKER} (lost, or not copied along): continuing from the"
    assert f"{said} newest whole checkpoint, that of step 4\n" in run.out
    assert run.losses == {step: whole.losses[step] for step in (5, 6, 7, 8)}
    assert latest_step(save) == 8


def test_without_tracker_nothing_is_overwritten(entry, preset, save, tmp_path):
    run = entry.run(tmp_path, "--config", preset, "--save", save)
    assert run.code == 2
    assert run.err == (
        f"error: --save {save} holds a checkpoint of step 8, which this run would replace; add"
        f" --load {save} to continue it, or use another folder\n"
    )
    # Copied by a pattern that leaves out names with a dot in front: unknown is not nothing.
    for step in (4, 8):
        (save / f"iter_000000{step}/.metadata").unlink()
    before = sorted(save.rglob("*"))
    run = entry.run(tmp_path, "--config", preset, "--save", save, "--load", save)
    assert run.code == 2
    assert run.err == (
        f"error: checkpoint {save}/iter_0000008 is incomplete: it has no .metadata; the 1 earlier"
        " ones are damaged too\n"
    )
    assert sorted(save.rglob("*")) == before


def test_a_run_killed_in_its_first_save_starts_anew(entry, preset, whole, tmp_path):
    save = tmp_path / "save"
    (save / "iter_0000004").mkdir(parents=True)
    (save / "iter_0000004/__0_0.distcp").write_bytes(b"half")
    run = entry.run(tmp_path, "--config", preset, "--save", save, "--load", save)
    assert (run.code, run.err) == (0, "")
    assert run.losses == whole.losses
