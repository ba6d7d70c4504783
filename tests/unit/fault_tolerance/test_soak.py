"""What `mlra soak` says of a job that failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mlra.fault_tolerance.soak import Errors, Job, main, parser

SAYS = "import sys; print('warning', 'error: a b', 'error: the disk is full', 'end', sep='\\n',"
SAYS += " file=sys.stderr)"


def heard(file: Path) -> Errors:
    """What is kept of a process that says four lines."""
    errors = Errors(file)
    process = subprocess.Popen([sys.executable, "-c", SAYS], stderr=subprocess.PIPE, text=True)
    errors.begin(process.stderr)
    process.wait()
    errors.end()
    return errors


def test_errors_are_kept_where_the_disk_is_full(tmp_path):
    args = parser().parse_args(["--config", "debug", "--work", str(tmp_path)])
    job = Job(args, "alone", [])
    job.errors = heard(tmp_path / "errors.txt")
    assert (tmp_path / "errors.txt").read_text().split("\n")[2:] == [
        "error: the disk is full",
        "end",
        "",
    ]
    why = "the run alone failed: the disk is full; "
    assert job.failed() == f"{why}see {tmp_path}/errors.txt"
    job.errors = heard(Path("/dev/full"))
    assert job.failed() == f"{why}/dev/full: No space left on device"


def test_a_full_disk_is_refused_before_the_jobs(full_disk, capsys):
    work = full_disk / "soak"
    assert main(["--config", "debug", "--work", str(work)]) == 2
    said = f"error: --work {work}: the folder {work} cannot be written (No space left on device);"
    assert capsys.readouterr().err == f"{said} use another\n"


@pytest.mark.parametrize("kills", [298, 300])
def test_too_many_kills_are_refused(kills, tmp_path, capsys):
    assert main(["--config", "debug", "--work", str(tmp_path), "--kills", str(kills)]) == 2
    assert f"--kills {kills} needs at least --steps {kills + 3}" in capsys.readouterr().err


def test_a_job_ends_with_a_soak_that_fails(tmp_path, monkeypatch):
    """A rank that is not there is an error; the job would have gone on without the soak."""
    args = parser().parse_args(["--config", "debug", "--work", str(tmp_path), "--steps", "9"])
    job, pids = Job(args, "killed", []), []
    line = "step {}/9 | lm loss 1.0000 | grad norm 1"
    code = f"import time; print({line.format(1)!r}, flush=True); time.sleep(60)"
    job.command = [sys.executable, "-c", code]

    def no_rank(launcher: int, rank: int) -> None:
        pids.append(launcher)
        raise RuntimeError(f"the job has no process of rank {rank}")

    monkeypatch.setattr("megatron_mlra.fault_tolerance.soak.kill_rank", no_rank)
    with pytest.raises(RuntimeError, match="no process of rank 1"):
        job.run([(1, 1, 0.0)])
    assert not Path(f"/proc/{pids[0]}").exists()
