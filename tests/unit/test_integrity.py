"""What is checked before a checkpoint is loaded or a folder written to. The files themselves are
damaged in tests/e2e/test_bad_input.py, on checkpoints of real runs."""

from __future__ import annotations

import shutil
from argparse import Namespace
from types import SimpleNamespace

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mlra.checkpoint import integrity


def save_args(folder, **changes):
    values = {"save": str(folder), "load": None, "bf16": False, "fp16": False}
    return Namespace(**values | {"no_save_optim": False} | changes)


def test_latest_step(tmp_path):
    assert integrity.latest_step(tmp_path) is None
    (tmp_path / integrity.TRACKER).write_text("12\n")
    assert integrity.latest_step(tmp_path) == 12
    (tmp_path / integrity.TRACKER).write_text("release")
    (tmp_path / "release").mkdir()
    assert integrity.iteration_folder(tmp_path) == tmp_path / "release"


@pytest.mark.parametrize(
    ("changes", "bytes_a_weight"),
    [({}, 12), ({"bf16": True}, 14), ({"bf16": True, "no_save_optim": True}, 2)],
)
def test_room_for_a_checkpoint(tmp_path, monkeypatch, changes, bytes_a_weight):
    args = save_args(tmp_path / "new", **changes)
    needed = 1000 * bytes_a_weight
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    integrity.check_save(args, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(ValueError, match="and a checkpoint needs"):
        integrity.check_save(args, 1000)
    assert not (tmp_path / "new").exists()


def test_a_run_may_continue_in_its_own_folder_only(tmp_path, monkeypatch):
    (tmp_path / integrity.TRACKER).write_text("12")
    monkeypatch.chdir(tmp_path)
    integrity.check_save(save_args(tmp_path, load="."), 1)
    with pytest.raises(ValueError, match="holds a checkpoint of step 12, which this run would rep"):
        integrity.check_save(save_args(tmp_path, load=".."), 1)


def test_the_reason_is_the_first_ranks_own_error():
    full = OSError(28, "No space left on device")
    worker = RuntimeError(
        f"Worker failure: An error is caught while starting worker 0, error: {full}"
    )
    failed = CheckpointException("write", {1: (worker, None)})
    assert integrity.reason(failed) == "[Errno 28] No space left on device"
    assert integrity.reason(full) == "[Errno 28] No space left on device"
