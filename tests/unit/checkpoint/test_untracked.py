"""Readers of a run whose tracker file is lost or empty: the newest whole step, and a line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_mlra.checkpoint.cli import main as convert
from megatron_mlra.checkpoint.files.tracker import TRACKER, a_checkpoint
from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.description.model import CheckpointError
from megatron_mlra.inference.cli import main as generate
from megatron_mlra.serving import cli as serving
from support.random_checkpoint import RandomFolder, latent

LOST = "warning: {} has no " + TRACKER + " (lost, or not copied along): reading"
EMPTY = "warning: {}/" + TRACKER + " is empty (its writer died): reading"
NEWEST = " the newest whole checkpoint, that of step {}\n"


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> Path:
    """Steps 2 and 4 of a run, and a save of step 6 that was interrupted; no tracker."""
    run = tmp_path_factory.mktemp("untracked") / "run"
    write_megatron(RandomFolder(latent(4, 4)), run, progress=False)
    (run / "release").rename(run / "iter_0000004")
    shutil.copytree(run / "iter_0000004", run / "iter_0000002")
    shutil.copytree(run / "iter_0000004", run / "iter_0000006")
    for name in (".metadata", "metadata.json", "integrity.json"):
        (run / "iter_0000006" / name).unlink()
    (run / TRACKER).unlink()
    return run


@pytest.fixture
def run(steps, tmp_path) -> Path:
    """A copy of `steps`."""
    return shutil.copytree(steps, tmp_path / "run")


COMMANDS = {
    "inspect": lambda run: convert(["inspect", str(run)]),
    "reshard": lambda run: convert(["reshard", str(run), str(run.parent / "out"), "--quiet"]),
    "export-hf": lambda run: convert(
        ["export-hf", str(run), str(run.parent / "out"), "--tokenizer", "byte", "--quiet"]
    ),
    "generate": lambda run: generate([str(run), "--prompt", "a", "--max-new-tokens", "1"]),
    "serve": lambda run: (
        serving.exported(
            serving.parser().parse_args([str(run), "--tokenizer", "byte"]),
            run,
            open_checkpoint(run),
        )
        != run / "exported" / "iter_0000004"
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_reader_takes_the_newest_whole_step(command, run, capsys):
    a_checkpoint(run, "checkpoint")
    assert COMMANDS[command](run) == 0
    said = capsys.readouterr().err
    assert said.startswith(LOST.format(run) + NEWEST.format(4)), said
    assert said.count("warning") == 1


def test_an_empty_tracker_is_as_none(run, capsys):
    (run / TRACKER).write_text("\n")
    assert open_checkpoint(run).folder == run / "iter_0000004"
    first, *rest = capsys.readouterr().err.splitlines(keepends=True)
    # The newest folder is the one of the save in which the tracker was emptied.
    assert "iter_0000006" in first and first.startswith("warning: ")
    assert rest == [EMPTY.format(run) + NEWEST.format(4)]


def test_a_damaged_step_is_passed_over(run, capsys):
    (weights,) = (run / "iter_0000004").glob("*_0.distcp")
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert open_checkpoint(run).folder == run / "iter_0000002"
    first, second = capsys.readouterr().err.splitlines(keepends=True)
    assert "iter_0000004 is damaged: " in first and first.startswith("warning: ")
    assert second == LOST.format(run) + NEWEST.format(2)
    assert open_checkpoint(run, verify=False).folder == run / "iter_0000004"


def test_where_no_step_is_whole_the_reader_says_so(run):
    for step in (2, 4):
        (run / f"iter_000000{step}/.metadata").unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000004 .*; the 1 earlier ones are damaged"):
        open_checkpoint(run)
    for step in (2, 4):
        shutil.rmtree(run / f"iter_000000{step}")
    with pytest.raises(CheckpointError, match="holds no checkpoint: no latest_checkpointed"):
        open_checkpoint(run)
    with pytest.raises(CheckpointError, match="holds no checkpoint: no latest_checkpointed"):
        a_checkpoint(run, "checkpoint")
    shutil.rmtree(run / "iter_0000006")
    (run / TRACKER).touch()
    with pytest.raises(
        CheckpointError, match=r"is empty \(its writer died\), and there is no step"
    ):
        open_checkpoint(run)


def test_a_tracker_that_names_a_missing_step_lists_the_others(run):
    (run / TRACKER).write_text("8")
    said = "iter_0000008 is missing, though .* names it; there is iter_0000002, iter_0000004, iter"
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(run)


def test_a_release_without_a_tracker_is_not_guessed(run):
    (run / "iter_0000004").rename(run / "release")
    with pytest.raises(ValueError, match="write the word release into that file"):
        open_checkpoint(run)
    with pytest.raises(ValueError, match="write the word release into that file"):
        a_checkpoint(run, "checkpoint")


def test_a_step_that_is_a_link_elsewhere_is_not_followed(run):
    shutil.move(run / "iter_0000004", run.parent / "other")
    (run / "iter_0000004").symlink_to(run.parent / "other")
    shutil.rmtree(run / "iter_0000002")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        open_checkpoint(run)
