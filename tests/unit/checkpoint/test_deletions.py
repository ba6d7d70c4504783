"""What is emptied, replaced or deleted was made by this project; what others put there stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mlra.checkpoint.files.staging import MARKER, written_aside
from megatron_mlra.command_line.parser import own_name, write_text
from megatron_mlra.data.errors import InputError
from megatron_mlra.data.writer import check_output
from megatron_mlra.fault_tolerance import checksums, retention, saved_steps
from megatron_mlra.fault_tolerance.rank_state import leave_stacks
from mlra_kernels.benchmarks.report import write_json
from support import ROOT


@pytest.fixture
def theirs(tmp_path) -> Path:
    """Somebody's folder."""
    folder = tmp_path / "theirs"
    (folder / "deep").mkdir(parents=True)
    for file in (folder / "thesis.txt", folder / "deep" / "data"):
        file.write_text("years of work")
    return folder


def intact(folder: Path) -> bool:
    files = (folder / "thesis.txt", folder / "deep" / "data")
    return all(file.read_text() == "years of work" for file in files)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


WRITERS = (
    ["import-official", "{research}"],
    ["export-official", "{megatron}"],
    ["export-hf", "{megatron}"],
    ["import-hf", "{exported}"],
    ["reshard", "{megatron}"],
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    from megatron_mlra.checkpoint.cli import main
    from support.research_model import VARIANTS, save_research

    root = tmp_path_factory.mktemp("sources")
    folders = {name: str(root / name) for name in ("research", "megatron", "exported")}
    save_research(Path(folders["research"]), VARIANTS["MLRA-4"])
    assert main(["import-official", folders["research"], folders["megatron"], "--quiet"]) == 0
    assert main(["export-hf", folders["megatron"], folders["exported"], "--quiet"]) == 0
    return folders


@pytest.mark.parametrize("command", WRITERS, ids=lambda words: words[0])
def test_a_partial_folder_of_somebody_else_stays(command, sources, theirs, convert, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    argv = [word.format(**sources) for word in command] + [str(out)]

    def refused() -> None:
        before = tree(tmp_path)
        code, error = convert(*argv)
        assert code == 2 and error.startswith(f"error: {partial} is in the way") and MARKER in error
        assert error.count("\n") == 1 and intact(theirs) and tree(tmp_path) == before

    partial.symlink_to(theirs)
    refused()
    (theirs / MARKER).symlink_to("thesis.txt")
    refused()
    partial.unlink()
    (theirs / MARKER).unlink()
    theirs.rename(partial)
    partial.rename(theirs)
    for make in (partial.mkdir, lambda: partial.write_text("a file")):
        make()
        refused()
        partial.rmdir() if partial.is_dir() else partial.unlink()
    partial.symlink_to(tmp_path / "gone")
    refused()
    partial.unlink()
    assert convert(*argv)[0] == 0 and out.is_dir() and not (out / MARKER).exists()


def test_a_folder_that_only_looks_like_a_partial_one_stays(theirs, tmp_path):
    partial = tmp_path / "out.partial"
    theirs.rename(partial)
    for content in (b"", b"something else", None):
        if content is not None:
            (partial / MARKER).write_bytes(content)
        else:
            (partial / MARKER).unlink()
            os.mkfifo(partial / MARKER)
        with pytest.raises(ValueError, match="is in the way"), written_aside(tmp_path / "out", 0):
            pass
        assert intact(partial)


def test_a_killed_conversions_folder_is_taken_over_and_its_links_are_not_followed(theirs, tmp_path):
    code = (
        "import os, sys\nfrom megatron_mlra.checkpoint.files.staging import written_aside\n"
        "with written_aside(sys.argv[1], 0) as folder:\n"
        "    (folder / 'half').mkdir()\n    (folder / 'half' / 'file').write_text('')\n"
        "    (folder / 'link').symlink_to(sys.argv[2])\n    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "out", theirs], check=False)
    assert (tmp_path / "out.partial" / "half" / "file").is_file()
    with written_aside(tmp_path / "out", 0) as folder:
        assert [path.name for path in folder.iterdir()] == [MARKER]
        (folder / "new").write_text("")
        busy = pytest.raises(ValueError, match="is being written by another process")
        with busy, written_aside(tmp_path / "out", 0):
            pass
    assert tree(tmp_path / "out") == ["new"] and intact(theirs)


def test_pruning_deletes_no_link_and_nothing_that_only_begins_like_its_own(theirs, tmp_path):
    save = tmp_path / "save"
    save.mkdir()
    (save / saved_steps.TRACKER).write_text("3")
    (save / ".deleted-iter_0000001").symlink_to(theirs)
    for name in (".deleted-iter_", ".deleted-iter_0000001-keep", ".deleted-iter_mine"):
        (save / name).mkdir()
        (save / name / "file").write_text("")
    (save / ".deleted-iter_0000002" / "old").mkdir(parents=True)
    assert retention.prune(save, 1) == []
    assert intact(theirs) and (save / ".deleted-iter_0000001").is_symlink()
    assert not (save / ".deleted-iter_0000002").exists()
    assert len(list(save.rglob("file"))) == 3


def test_nothing_is_written_through_a_link_that_lies_at_a_name_aside(theirs, tmp_path):
    file = theirs / "thesis.txt"
    out = tmp_path / "out.txt"
    own_name(out).symlink_to(file)
    write_text(out, "new")
    assert out.read_text() == "new" and intact(theirs)
    (tmp_path / f".{checksums.MANIFEST}.tmp").symlink_to(file)
    checksums.write_manifest(tmp_path)
    assert not (tmp_path / checksums.MANIFEST).is_symlink() and intact(theirs)
    tracker = tmp_path / saved_steps.TRACKER
    tracker.write_text("")
    (tmp_path / tracker.with_suffix(".tmp").name).symlink_to(file)
    saved_steps.mend_tracker(tmp_path, 7)
    assert tracker.read_text() == "7" and intact(theirs)


@pytest.mark.parametrize("suffix", [".json", ".idx", ".bin"])
def test_overwrite_replaces_datasets_alone(suffix, tmp_path):
    prefix = str(tmp_path / "config")
    file = Path(prefix + suffix)
    for content in ('{"version": 1, "model_type": "x"}', "no dataset", "[]"):
        file.write_text(content)
        with pytest.raises(InputError, match=f"output {file} is no part of a dataset, so"):
            check_output(prefix, overwrite=True)
        assert file.read_text() == content
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError, match="is no part of a dataset"):
        check_output(prefix, overwrite=True)
    file.unlink()
    file.symlink_to("gone")
    for overwrite in (True, False):
        with pytest.raises(InputError, match=f"output {file}"):
            check_output(prefix, overwrite=overwrite)


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_the_demo_deletes_only_in_a_folder_that_it_made(kind, theirs, tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / "examples").mkdir(parents=True)
    (checkout / "runs").mkdir()
    (checkout / "examples" / "demo.sh").write_text((ROOT / "examples" / "demo.sh").read_text())
    run = checkout / "runs" / "demo"
    (theirs / "checkpoint").mkdir()
    (theirs / "checkpoint" / "weights").write_text("mine")
    if kind == "link":
        (theirs / ".made-by-the-demo").write_text("")
        run.symlink_to(theirs)
    else:
        theirs.rename(run)
    done = subprocess.run(
        ["bash", checkout / "examples" / "demo.sh", "false"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: runs/demo is there and was not")
    assert (run / "checkpoint" / "weights").read_text() == "mine"


def test_stacks_of_a_hang_replace_a_link_and_not_what_it_points_to(tmp_path):
    theirs, log = tmp_path / "theirs", tmp_path / "hang-rank-0.log"
    theirs.write_text("years of work")
    log.symlink_to(theirs)
    leave_stacks(log)
    assert theirs.read_text() == "years of work"
    assert not log.is_symlink() and "most recent call first" in log.read_text()
    leave_stacks(log)
    leave_stacks(tmp_path / "gone/hang-rank-0.log")


def test_results_of_a_benchmark_appear_whole_or_not(tmp_path):
    file = tmp_path / "results.json"
    write_json(file, {"us": 1})
    with pytest.raises(TypeError):
        write_json(file, {"us": object()})
    assert json.loads(file.read_text()) == {"us": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
