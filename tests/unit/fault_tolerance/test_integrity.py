"""What is checked before a checkpoint is loaded or a folder written to. The files themselves are
damaged in tests/e2e/test_bad_input.py, on checkpoints of real runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from argparse import Namespace
from types import SimpleNamespace

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mlra.checkpoint.files.torch_dist_index import read_metadata
from megatron_mlra.checkpoint.megatron import torch_dist
from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.fault_tolerance import integrity, saved_steps
from support.random_checkpoint import RandomFolder, latent


def save_args(folder, **changes):
    values = {"save": str(folder), "load": None, "bf16": False, "fp16": False}
    return Namespace(**values | {"no_save_optim": False} | changes)


def test_latest_step(tmp_path):
    assert saved_steps.latest_step(tmp_path) is None
    (tmp_path / saved_steps.TRACKER).write_text("12\n")
    assert saved_steps.latest_step(tmp_path) == 12
    (tmp_path / saved_steps.TRACKER).write_text("release")
    assert saved_steps.candidates(tmp_path) == [tmp_path / "release"]


def test_candidates_are_the_latest_step_and_those_before(tmp_path):
    assert saved_steps.candidates(tmp_path) == []
    for name in ("iter_0000004", "iter_0000008", "iter_0000012", "iter_0000016.partial", "logs"):
        (tmp_path / name).mkdir()
    tracker = tmp_path / saved_steps.TRACKER
    for text, steps in (("8", [8, 4]), ("10", [10, 8, 4]), ("", [12, 8, 4])):
        tracker.write_text(text)
        found = [path.name for path in saved_steps.candidates(tmp_path)]
        assert found == [f"iter_{step:07d}" for step in steps]
    assert [path.name for path in saved_steps.candidates(tmp_path, 12)] == ["iter_0000012"]


def test_without_a_tracker_every_finished_save_is_a_candidate(tmp_path):
    for step, last in ((4, ".metadata"), (8, "metadata.json"), (12, "__0_0.distcp")):
        (tmp_path / f"iter_{step:07d}").mkdir()
        (tmp_path / f"iter_{step:07d}" / last).touch()
    found = [path.name for path in saved_steps.candidates(tmp_path)]
    assert found == ["iter_0000008", "iter_0000004"]
    with pytest.raises(ValueError, match="holds a checkpoint of step 8, which this run would"):
        integrity.check_save(save_args(tmp_path), 1)
    (tmp_path / "release").mkdir()
    with pytest.raises(ValueError, match="write the word release into that file"):
        saved_steps.candidates(tmp_path)


def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path):
    (tmp_path / saved_steps.TRACKER).write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not a step"):
        saved_steps.latest_step(tmp_path)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o311)  # to be entered, not to be listed
        before = os.geteuid()
        os.seteuid(65534 if before == 0 else before)
        try:
            with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\)"):
                saved_steps.candidates(folder)
        finally:
            os.seteuid(before)
            os.chmod(folder, 0o700)


def test_first_usable_says_why_others_are_not(tmp_path):
    folders = [tmp_path / f"iter_{step:07d}" for step in (8, 4)]
    for folder in folders:
        folder.mkdir()

    def refuse(*bad):
        def check(folder):
            if folder in bad:
                raise ValueError(f"{folder.name} is bad")

        return check

    assert integrity.first_usable([], refuse()) == (None, [])
    assert integrity.first_usable(folders, refuse()) == (folders[0], [])
    assert integrity.first_usable(folders, refuse(folders[0])) == (
        folders[1],
        ["iter_0000008 is bad"],
    )
    with pytest.raises(ValueError, match="iter_0000008 is bad; the 1 earlier ones are damaged too"):
        integrity.first_usable(folders, refuse(*folders))
    with pytest.raises(ValueError, match="iter_0000004: --ckpt-step names the step to load"):
        integrity.first_usable(folders[:1], refuse(*folders))


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


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_layers": 6}, "num_layers is 2 there, 6 here; use its values, or another --load"),
        (
            {"vocab_size": 1000, "padded_vocab_size": 1024},
            "1024 here (the 1000 tokens of this run's data do not fit; use data of its tokenizer)",
        ),
    ],
)
def test_another_architecture_is_named_with_the_way_out(tmp_path, changed, said):
    write_megatron(RandomFolder(latent(4, 4)), tmp_path / "saved", progress=False)
    stored = torch_dist.TorchDistFolder(tmp_path / "saved" / "release")
    args = Namespace(**vars(stored.common_state()["args"]) | changed)
    with pytest.raises(ValueError, match="is of another architecture") as refused:
        integrity.check_architecture(stored, args)
    assert said in str(refused.value)


def test_a_run_may_continue_in_its_own_folder_only(tmp_path, monkeypatch):
    (tmp_path / saved_steps.TRACKER).write_text("12")
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


def test_a_start_reads_an_index_once(tmp_path, monkeypatch):
    """The index of a large run has hundreds of megabytes, read in plain Python."""
    write_megatron(RandomFolder(latent(4, 4)), tmp_path / "saved", progress=False)
    reads = []

    def counted(folder, *rest):
        reads.append(folder)
        return read_metadata(folder, *rest)

    monkeypatch.setattr(torch_dist, "read_metadata", counted)
    saved = integrity.opened(tmp_path / "saved/release").common_state()["args"]
    integrity.forget_opened()
    reads.clear()
    args = Namespace(**vars(saved), load=str(tmp_path / "saved"), save=None, ckpt_step=None)
    args.exit_on_missing_checkpoint, args.finetune = True, False
    integrity.check_load(args)
    integrity.check_complete(tmp_path / "saved/release")
    assert len(reads) == 1
    # A file that changes is read again.
    (tmp_path / "saved/release/.metadata").touch()
    integrity.check_complete(tmp_path / "saved/release")
    assert len(reads) == 2


def test_a_run_with_finetune_replaces_no_checkpoint_of_its_own_folder(tmp_path):
    """It begins at step 0: it would write over the steps that it has loaded."""
    args = Namespace(save=str(tmp_path), load=f"{tmp_path}/", finetune=True)
    saved_steps.check_unused(args)
    (tmp_path / saved_steps.TRACKER).write_text("release")  # weights of mlra convert
    saved_steps.check_unused(args)
    (tmp_path / saved_steps.TRACKER).write_text("12")
    with pytest.raises(ValueError, match=r"step 12, which this run would replace, since --finetun"):
        saved_steps.check_unused(args)
    saved_steps.check_unused(Namespace(save=args.save, load=args.load, finetune=False))
