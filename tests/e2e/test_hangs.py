"""Ranks that hang, in real processes: the job ends in time, and the right rank is named."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from support.runs import GET_BATCH, wait_for

LIMIT = 8
LIVES = ["--hang-timeout-seconds", LIMIT, "--train-iters", 400, "--log-interval", 1]
SAVE = "megatron.training.training:save_checkpoint"
BUILD_DATASETS = "megatron_mlra.training.batches:build_datasets"


def who(rank: int, pid: int) -> str:
    return rf"rank {rank} \(host \S+, pid {pid}, local rank {rank}\) hangs: "


def the_line(err: str) -> str:
    """The one line about the hang; a rank may add that its peer is gone."""
    lines = [line for line in err.splitlines() if "hangs" in line]
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_stopped_process_is_named(entry, preset, tmp_path, frozen):
    pids = entry.start(tmp_path, "--config", preset, *LIVES, ranks=2)
    wait_for(tmp_path / "stdout-1.txt", "step 3/")
    os.kill(pids[frozen], signal.SIGSTOP)
    begin = time.monotonic()
    survivor = entry.wait(tmp_path, [pids[1 - frozen]])
    took = time.monotonic() - begin
    os.kill(pids[frozen], signal.SIGKILL)
    entry.wait(tmp_path, [pids[frozen]])
    assert survivor.code == 1
    err = (tmp_path / f"stderr-{1 - frozen}.txt").read_text()
    assert re.fullmatch(
        rf"error: {who(frozen, pids[frozen])}no sign of life for \d+ s; last at step \d+, .+"
        rf" \(--hang-timeout-seconds {LIMIT}\)",
        the_line(err),
    ), err
    assert took > LIMIT / 2


ASLEEP = {
    # Stage 0 hangs ahead of stage 1: what it does tells them apart, not how far they are.
    "pipeline": (0, ["--pipeline-model-parallel-size", 2], GET_BATCH, "loading data"),
    "tensor": (1, ["--tensor-model-parallel-size", 2], GET_BATCH, "loading data"),
    "save": (1, ["--save", "run", "--save-interval", 3], SAVE, "saving"),
}


@pytest.mark.parametrize("case", ASLEEP)
def test_a_rank_that_keeps_the_others_waiting_is_named(entry, preset, tmp_path, case):
    rank, flags, place, phase = ASLEEP[case]
    sleep = {"ranks": [rank], "place": place, "seconds": 600, "step": 3}
    pids = entry.start(tmp_path, "--config", preset, *LIVES, *flags, ranks=2, asleep=[sleep])
    run = entry.wait(tmp_path, pids)
    assert run.code == 1
    assert re.fullmatch(
        rf"error: {who(rank, pids[rank])}alive, but no progress for \d+ s; at step 3, {phase},"
        rf" entry_worker.py:\d+ \(slow\) \(--hang-timeout-seconds {LIMIT}\)",
        the_line(run.err),
    ), run.err
    folder = tmp_path / ("run" if case == "save" else "runs/tiny")
    assert "in slow" in (folder / f"hang-rank-{rank}.log").read_text()
    assert not (folder / f"hang-rank-{1 - rank}.log").exists()


def test_slow_phases_are_no_hang(entry, preset, tmp_path):
    both, seconds = [0, 1], 9
    asleep = [
        {"ranks": both, "place": BUILD_DATASETS, "seconds": seconds},
        {"ranks": both, "place": GET_BATCH, "seconds": seconds, "step": 1},
        {"ranks": both, "place": SAVE, "seconds": seconds, "step": 3},
    ]
    flags = ["--hang-timeout-seconds", seconds - 2, "--save", "run", "--save-interval", 3]
    flags += ["--train-iters", 4, "--eval-iters", 0]
    run = entry.run(tmp_path, "--config", preset, *flags, ranks=2, asleep=asleep)
    assert (run.code, run.err) == (0, ""), run.err


def test_a_whole_job_may_be_stopped(entry, preset, tmp_path):
    out, flags = tmp_path / "stdout-1.txt", ["--hang-timeout-seconds", 6, "--train-iters", 100000]
    pids = entry.start(tmp_path, "--config", preset, *LIVES, *flags, ranks=2)
    wait_for(out, "step 3/")
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(9)
    said = len(out.read_text().splitlines())
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    wait_for(out, f"step {said + 50}/")
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    run = entry.wait(tmp_path, pids)
    assert (run.code, run.err) == (0, ""), run.err


@pytest.mark.parametrize(
    ("seconds", "why"),
    [
        (-1, "is too short; use at least 1, or 0 for never"),
        (
            600,
            "comes after the 600 seconds of a collective, which name no rank; use less, or raise",
        ),
    ],
)
def test_limits_that_make_no_sense(entry, preset, tmp_path, seconds, why):
    run = entry.run(tmp_path, "--config", preset, "--hang-timeout-seconds", seconds)
    assert run.code == 2
    assert run.err.startswith(f"error: --hang-timeout-seconds {seconds} {why}")
    assert run.err.count("\n") == 1
