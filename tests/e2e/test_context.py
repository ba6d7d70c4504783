"""Runs of the entry with context parallel and with packed sequences, against runs without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.runs import Run, scalars

CP, PP = "--context-parallel-size", "--pipeline-model-parallel-size"
TP2 = ["--tensor-model-parallel-size", 2, "--sequence-parallel"]
STEPS = ["--exit-interval", 4, "--log-interval", 1, "--eval-interval", 100]
MASKED = ["--reset-attention-mask", "--eod-mask-loss"]
PACKED = ["--packed-sequences", "--eod-mask-loss"]
# Micro-batches of one row: what pipeline stages take of packed sequences.
ROWS = ["--num-layers", 4, "--micro-batch-size", 1, "--use-distributed-optimizer"]


def assert_same(run: Run, expected: Run, *names: str) -> None:
    """Whether both runs say the same of the steps of the first."""
    assert run.code == 0, run.err
    for name in names:
        values, wanted = scalars(run.folder, name), scalars(expected.folder, name)
        assert values
        assert values == pytest.approx({step: wanted[step] for step in values}, rel=1e-4), name


def as_of(step: int, save: Path, start: Path) -> Path:
    """A copy of a run's checkpoints as they were after a step."""
    name = f"iter_{step:07d}"
    shutil.copytree(save / name, start / name)
    (start / "latest_checkpointed_iteration.txt").write_text(str(step))
    return start


@pytest.fixture(scope="module")
def masked(entry, preset, tmp_path_factory) -> Run:
    """Documents kept apart by a mask, on one rank; its checkpoint of step 2 is in start/."""
    folder = tmp_path_factory.mktemp("masked")
    argv = [*MASKED, *ROWS, *STEPS, "--save", folder / "save", "--save-interval", 2]
    run = entry.run(folder, "--config", preset, *argv)
    assert run.code == 0, run.err
    as_of(2, folder / "save", folder / "start")
    return run


def test_context_parallel_trains_as_one_rank(entry, preset, whole, tmp_path):
    argv = ["--config", preset, "--log-interval", 1, "--use-distributed-optimizer"]
    save = tmp_path / "save"
    run = entry.run(tmp_path, *argv, CP, 2, "--eval-at-start", "--save", save, ranks=2)
    assert_same(run, whole, "lm loss", "grad-norm", "lm loss validation", "lm loss test")
    assert sorted(run.losses) == list(range(1, 9))
    assert "\n  processes: 2: each sequence cut over 2 (CP2)\n" in run.out
    start = as_of(4, save, tmp_path / "start")
    resumed = entry.run(tmp_path / "one", *argv, "--load", start)
    assert_same(resumed, whole, "lm loss", "grad-norm")
    assert sorted(resumed.losses) == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (0, PACKED),
        (2, [*PACKED, CP, 2]),
        (4, [*PACKED, CP, 2, *TP2]),
        (4, [*PACKED, PP, 4]),
        (2, [*MASKED, CP, 2]),
    ],
    ids=["packed", "packed CP2", "packed TP2 CP2", "packed PP4", "mask CP2"],
)
def test_documents_train_as_under_a_mask(entry, preset, masked, tmp_path, ranks, flags):
    argv = ["--config", preset, *flags, *ROWS, *STEPS, "--load", masked.folder / "start"]
    run = entry.run(tmp_path, *argv, ranks=ranks)
    assert_same(run, masked, "lm loss", "grad-norm")
    assert sorted(run.losses) == [3, 4]
    assert ("documents packed" in run.out) == ("--packed-sequences" in flags)


def test_packed_rows_are_joined(entry, preset, tmp_path):
    """A micro-batch of two rows is one row twice as long, of the same documents."""
    argv = ["--config", preset, "--packed-sequences", *STEPS]
    rows = entry.run(tmp_path / "rows", *argv, "--micro-batch-size", 1)
    joined = entry.run(tmp_path / "joined", *argv, "--micro-batch-size", 2, CP, 2, ranks=2)
    assert_same(joined, rows, "lm loss", "grad-norm")
