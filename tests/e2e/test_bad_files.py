"""Datasets, checkpoints and disks that cannot be used: a line names the fault; nothing changes."""

from __future__ import annotations

import shutil
import struct

import pytest

from support.runs import check_refused


def rewrite(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


DATA = {
    "no-index": (lambda f: (f / "text.idx").unlink(), "text.idx does not exist; make it with"),
    "no-tokens": (lambda f: (f / "text.bin").unlink(), "text.bin does not exist; make it with"),
    "empty-index": (
        lambda f: (f / "text.idx").write_bytes(b""),
        "text.idx is not a Megatron index; preprocess the data again",
    ),
    "bad-magic": (
        lambda f: rewrite(f, "text.idx", lambda d: b"X" + d[1:]),
        "text.idx is not a Megatron index",
    ),
    "bad-version": (
        lambda f: rewrite(f, "text.idx", lambda d: d[:9] + struct.pack("<Q", 7) + d[17:]),
        "text.idx is not a Megatron index",
    ),
    "short-index": (
        lambda f: rewrite(f, "text.idx", lambda d: d[:60]),
        "text.idx is damaged: 60 bytes, where",
    ),
    "empty-tokens": (lambda f: (f / "text.bin").write_bytes(b""), "text.bin is truncated: 0 of "),
    "short-tokens": (
        lambda f: rewrite(f, "text.bin", lambda d: d[:-2]),
        "text.bin is truncated: ",
    ),
    "metadata": (
        lambda f: (f / "text.json").write_text("{"),
        "text.json is not a dataset's metadata",
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_data(entry, preset, corpus, tmp_path, case):
    data = tmp_path / "data"
    shutil.copytree(corpus.parent, data)
    damage, error = DATA[case]
    damage(data)
    check_refused(entry.run(tmp_path, "--config", preset, "--data-path", data / "text"), error)


CHECKPOINTS = {
    "architecture": (
        lambda f: None,
        ["--num-branches", "2", "--q-lora-rank", "16"],
        "is of another architecture: num_branches is 4 there, 2 here; q_lora_rank is 32 there, 16",
    ),
    "attention": (
        lambda f: None,
        ["--attention", "gqa"],
        "is of another architecture: attention is mlra there, gqa here",
    ),
    "tracker": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("four"),
        [],
        "holds 'four', not a step; write the step of a complete iter_* folder into it",
    ),
    "step": (
        lambda f: None,
        ["--ckpt-step", "5"],
        "iter_0000005 is missing; there is iter_0000004, iter_0000008: --ckpt-step names the step",
    ),
    "folder": (
        lambda f: shutil.rmtree(f / "iter_0000008"),
        ["--ckpt-step", "8"],
        "iter_0000008 is missing; there is iter_0000004: --ckpt-step names the step to load",
    ),
    "no-metadata": (
        lambda f: (f / "iter_0000008/.metadata").unlink(),
        ["--ckpt-step", "8"],
        "iter_0000008 is incomplete: it has no .metadata; there is iter_0000004: --ckpt-step nam",
    ),
    "bad-metadata": (
        lambda f: (f / "iter_0000008/.metadata").write_bytes(b"junk"),
        ["--ckpt-step", "8"],
        "iter_0000008: .metadata cannot be read",
    ),
    "no-file": (
        lambda f: (f / "iter_0000008/__0_0.distcp").unlink(),
        ["--ckpt-step", "8"],
        "iter_0000008 is incomplete: __0_0.distcp is missing",
    ),
    "short-file": (
        lambda f: rewrite(f, "iter_0000008/__0_0.distcp", lambda d: d[:-9]),
        ["--ckpt-step", "8"],
        "iter_0000008 is truncated: __0_0.distcp has ",
    ),
    "bad-arguments": (
        lambda f: rewrite(f, "iter_0000008/metadata.json", lambda d: b"{"),
        ["--ckpt-step", "8"],
        "iter_0000008/metadata.json is not JSON (",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(entry, preset, whole, tmp_path, case):
    save = tmp_path / "save"
    shutil.copytree(whole.folder / "save", save)
    damage, argv, error = CHECKPOINTS[case]
    damage(save)
    before = {path: path.read_bytes() for path in save.rglob("*") if path.is_file()}
    run = entry.run(tmp_path, "--config", preset, "--load", save, "--save", save, *argv)
    check_refused(run, error)
    assert before == {path: path.read_bytes() for path in save.rglob("*") if path.is_file()}


def test_another_runs_checkpoints_are_not_replaced(entry, preset, whole, tmp_path):
    save = whole.folder / "save"
    check_refused(
        entry.run(tmp_path, "--config", preset, "--save", save),
        f"--save {save} holds a checkpoint of step 8, which this run would replace; add --load",
    )


def test_too_little_disk(entry, preset, tmp_path):
    run = entry.run(tmp_path, "--config", preset, "--save", "run", free_bytes=1000)
    check_refused(run, "--save run has 1 kB free and a checkpoint needs 1.3 MB")
