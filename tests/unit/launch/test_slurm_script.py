"""`examples/slurm.sh` in a folder where others leave links. SLURM's programs are stand-ins here;
tests/cluster has the real ones."""

import os
import subprocess
from pathlib import Path

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
    else:
        assert not guard.exists()
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


def start(folder: Path, srun: str, scontrol: str, **env: str) -> subprocess.CompletedProcess:
    """Run the script as job 12007, with a line of shell for each of SLURM's programs."""
    for name, line in (("srun", srun), ("scontrol", scontrol)):
        (folder / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / name).chmod(0o755)
    return subprocess.run(
        ["bash", SCRIPT, "preset", "data", folder / "save"],
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "12007"} | env,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_the_first_of_very_many_hosts(tmp_path):
    """More names than a pipe holds: who reads the first alone would end scontrol by SIGPIPE."""
    hosts = f"case $2 in hostnames) seq -f node%05g 20000 ;; *) echo Command={SCRIPT} ;; esac"
    many = {"SLURM_JOB_NUM_NODES": "20000", "SLURM_JOB_NODELIST": "x"}
    done = start(tmp_path, 'echo "$RDZV_ENDPOINT"; exit 2', hosts, **many)
    assert (done.returncode, done.stdout) == (2, "node00001:20007\n"), done.stderr


@pytest.mark.parametrize(
    ("srun", "field", "env", "line"),
    [
        ("exit", "", {"SLURM_NTASKS_PER_NODE": "8"}, "--ntasks-per-node is 8; leave it out"),
        ("exit", "HetJobId=12007", {}, "12007 is a part of a heterogeneous job"),
        # SLURM warns at once, and srun has not begun to hand signals on.
        (
            "trap '' USR1; kill -USR1 $PPID; sleep 3",
            "TimeLimit=00:05:00",
            {},
            "the time limit of 00:05:00 is not longer than the warning ahead of it",
        ),
    ],
)
def test_jobs_of_another_form_are_refused(srun, field, env, line, tmp_path):
    save = tmp_path / "save"
    done = start(tmp_path, srun, f"echo Command={SCRIPT}; echo {field}", **env)
    assert done.returncode == 2 and done.stdout == "", done.stdout
    assert line in done.stderr and done.stderr.count("\n") == 1
    assert not list(save.glob("*"))


def test_a_job_that_is_not_requeued_says_so(tmp_path):
    scontrol = f"[ $1 != requeue ] || exit 1; echo Command={SCRIPT}"
    done = start(tmp_path, "exit 75", scontrol)
    assert done.returncode == 75
    assert done.stdout.endswith("sbatch again to go on\n")
    assert "SLURM does not requeue this job (--no-requeue?)" in done.stdout


def test_the_count_of_starts_of_a_job_that_submitted_this_one(tmp_path):
    """The first start of this job is told to stop, as scontrol requeue does."""
    restarts = 'echo Restarts=$(cat "${0%/*}/restarts" 2>/dev/null || echo 0)'
    srun = "trap '' USR1; echo 1 >\"${0%/*}/restarts\"; kill -TERM $PPID; sleep 1; exit 75"
    env = {"SLURM_RESTART_COUNT": "5"}
    done = start(tmp_path, srun, f"echo Command={SCRIPT}; {restarts}", **env)
    assert done.returncode == 75
    assert done.stdout.endswith("slurm.sh: stopped at step none; SLURM starts this job again\n")
