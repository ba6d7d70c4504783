"""`examples/slurm.sh` in a folder where others leave links. SLURM's programs are stand-ins here;
tests/cluster has the real ones."""

import os
import subprocess

import pytest

from support import ROOT

SCRIPT = ROOT / "examples/slurm.sh"


@pytest.mark.parametrize("before", ["", "none 1"])
def test_the_crash_count_is_not_written_where_a_link_points(tmp_path, before):
    save, programs, victim = tmp_path / "save", tmp_path / "programs", tmp_path / "victim"
    save.mkdir()
    programs.mkdir()
    victim.write_text(before)
    guard = save / "starts_without_progress.txt"
    # srun ends as a refused run does, behind a copy of the count that it finds.
    refused = f'cp "{guard}" "{tmp_path}/seen"; exit 2'
    for name, line in (("srun", refused), ("scontrol", f"echo Command={SCRIPT}")):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    guard.symlink_to(victim)
    guard.with_name(f"{guard.name}.partial").symlink_to(victim)
    done = subprocess.run(
        ["bash", SCRIPT, "preset", "data", save],
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "was refused" in done.stderr
    assert victim.read_text() == before
    assert (tmp_path / "seen").read_text() == f"none {2 if before else 1}\n"
    if before:
        assert not guard.is_symlink() and guard.read_text() == "none 1\n"
    assert not list(save.glob(".starts.*"))


def test_a_pipe_in_place_of_a_small_file_is_not_waited_for(tmp_path):
    save, programs = tmp_path / "save", tmp_path / "programs"
    save.mkdir()
    programs.mkdir()
    for name, line in (("srun", "exit 2"), ("scontrol", f"echo Command={SCRIPT}")):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    for name in ("starts_without_progress.txt", "latest_checkpointed_iteration.txt"):
        os.mkfifo(save / name)
    done = subprocess.run(
        ["bash", SCRIPT, "preset", "data", save],
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and "was refused" in done.stderr
