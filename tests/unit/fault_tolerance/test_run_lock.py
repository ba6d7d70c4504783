"""The lock of a save folder, contended for by real processes, in one and in several machines' eyes.

A process in a process-id namespace of its own counts as one on another machine: nobody outside can
tell by its process id whether it lives.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_mlra.fault_tolerance import run_lock
from megatron_mlra.fault_tolerance.run_lock import NAME, Owner, RunLock

OWN = """
import os, sys, time
from megatron_mlra.fault_tolerance import run_lock
run_lock.BEAT, run_lock.STALE = 0.2, 6.0
def lost(line):
    print(line, flush=True)
    os._exit(3)
lock = run_lock.RunLock(sys.argv[1], lost=lost)
lock.acquire()
if sys.argv[2:] == ["with writer"]:
    held, hold = os.pipe()
    if os.fork() == 0:
        run_lock.hold(lock.path)
        os.write(hold, b".")
        time.sleep(60)
    os.read(held, 1)
print("mine", flush=True)
time.sleep(60)
"""
ELSEWHERE = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.fixture
def owner(tmp_path):
    """Starts processes that own the lock of a folder until they are killed."""
    started = []

    def start(*argv: str, elsewhere: bool = False) -> subprocess.Popen:
        command = [sys.executable, "-c", OWN, str(tmp_path), *argv]
        if elsewhere:
            if subprocess.run([*ELSEWHERE, "true"], capture_output=True).returncode:
                pytest.skip("namespaces cannot be made here")
            command = [*ELSEWHERE, "sh", "-c", 'hostname node9; exec "$@"', "sh", *command]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "mine\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.2)
    monkeypatch.setattr(run_lock, "STALE", 6.0)


def acquire(folder: Path) -> float:
    """Take the lock and leave it; returns the seconds it took."""
    begin = time.monotonic()
    lock = RunLock(folder)
    lock.acquire()
    took = time.monotonic() - begin
    assert lock.is_mine()
    lock.release()
    assert [path.name for path in folder.iterdir()] == []
    return took


def test_a_folder_in_use_is_refused_and_left_alone(owner, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "812")
    process = owner()
    before = (tmp_path / NAME).read_text()
    with pytest.raises(ValueError, match="in use by another run") as refused:
        RunLock(tmp_path).acquire()
    line = str(refused.value)
    assert f"pid {process.pid}, job 812, since 20" in line
    assert line.endswith(f"(if it is gone for certain, delete {tmp_path / NAME})")
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert (tmp_path / NAME).read_text() == before


def test_a_dead_owner_is_succeeded_at_once(owner, tmp_path):
    process = owner()
    process.kill()
    process.wait()
    assert acquire(tmp_path) < 5


def test_a_process_id_that_is_used_again_is_another_process(owner, tmp_path):
    process = owner()
    process.kill()
    process.wait()
    there = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(there | {"pid": os.getpid()}))
    assert acquire(tmp_path) < 5


def test_a_writer_that_outlives_its_rank_is_waited_for(owner, tmp_path, monkeypatch):
    process = owner("with writer")
    (writer,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    monkeypatch.setattr(run_lock, "_WRITERS", 0.3)
    with pytest.raises(ValueError, match="still writes a checkpoint"):
        RunLock(tmp_path).acquire()
    os.kill(int(writer), signal.SIGKILL)
    monkeypatch.setattr(run_lock, "_WRITERS", 10)
    acquire(tmp_path)


@pytest.mark.parametrize("goes_on", [False, True], ids=["ending", "going on"])
def test_a_run_that_ends_waits_for_a_writer_that_ends(tmp_path, monkeypatch, goes_on):
    lock = RunLock(tmp_path)
    lock.acquire()
    hold = "import sys; from megatron_mlra.fault_tolerance.run_lock import hold; hold(sys.argv[1])"
    hold += "; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(lock.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as writer:
        writer.stdout.readline()
        if goes_on:
            monkeypatch.setattr(run_lock, "_ENDING", 0.2)
        else:
            threading.Timer(0.3, writer.stdin.close).start()
            monkeypatch.setattr(run_lock, "_ENDING", 60)
        lock.release()
        assert lock.path.exists() is goes_on


def test_an_owner_on_another_machine_is_judged_by_its_beat(owner, tmp_path):
    process = owner(elsewhere=True)
    said = []
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"host node9, pid .* is alive"):
        RunLock(tmp_path, said.append).acquire()
    # As soon as it beats, not once it could have been gone.
    assert time.monotonic() - begin < 5.9
    assert len(said) == 1
    assert "waiting up to" in said[0]
    process.kill()
    process.wait()
    assert acquire(tmp_path) > 0.5


def test_an_owner_that_was_stopped_and_succeeded_ends(owner, tmp_path):
    process = owner(elsewhere=True)
    inner = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(inner[0]), signal.SIGSTOP)
    lock = RunLock(tmp_path)
    lock.acquire()
    os.kill(int(inner[0]), signal.SIGCONT)
    assert "belongs to another run now" in process.stdout.readline()
    assert process.wait(60) == 3
    assert lock.is_mine()
    lock.release()


def test_a_lock_that_names_nobody_is_taken_once_it_is_old(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_HALF_WRITTEN", 0.2)
    other = Owner.this_process()
    for text in (
        '{"half',
        json.dumps(asdict(other) | {"token": "../../outside"}),
        json.dumps(asdict(other) | {"host": "\x1b[2J"}),
        "[" * 100000,
    ):
        (tmp_path / NAME).write_text(text)
        os.utime(tmp_path / NAME, (1, 1))
        lock = RunLock(tmp_path)
        assert lock.successor() is None
        if text == '{"half':
            acquire(tmp_path)


def test_a_lock_deleted_under_its_owner_comes_back(owner, tmp_path):
    owner()
    (tmp_path / NAME).unlink()
    deadline = time.monotonic() + 60
    while not (tmp_path / NAME).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(ValueError, match="in use"):
        RunLock(tmp_path).acquire()


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*run\.lock"):
        RunLock(tmp_path).acquire()
    assert not list(tmp_path.iterdir())


def test_a_folder_made_for_nothing_is_removed(tmp_path):
    lock = RunLock(tmp_path / "runs" / "new")
    lock.acquire()
    lock.release()
    assert not (tmp_path / "runs" / "new").exists()


CONTEND = """
import os, sys, time
from megatron_mlra.fault_tolerance import run_lock
folder, inside = sys.argv[1], sys.argv[1] + "-inside"
turns = 0
while turns < 15:
    pid = os.fork()
    if pid == 0:
        lock = run_lock.RunLock(folder)
        try:
            lock.acquire()
        except ValueError:
            os._exit(1)
        try:
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            os._exit(7)
        time.sleep(0.002)
        os.unlink(inside)
        if turns % 3 == 0:
            lock.release()
        os._exit(0)  # else it dies as the owner
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 7:
        sys.exit("two owners at once")
    if code not in (0, 1):
        sys.exit(f"a contender failed with {code}")
    turns += code == 0
"""


def test_there_are_never_two_owners(tmp_path):
    folder = tmp_path / "save"
    contenders = [subprocess.Popen([sys.executable, "-c", CONTEND, folder]) for _ in range(5)]
    codes = [contender.wait(120) for contender in contenders]
    assert codes == [0] * 5
    assert {path.name for path in folder.iterdir()} <= {NAME}


@pytest.mark.parametrize("kind", ["dangling", "link", "pipe", "folder"])
def test_a_lock_that_is_no_plain_file_is_refused(tmp_path, kind):
    path, victim = tmp_path / "run.lock", tmp_path / "victim"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(victim)
    if kind == "link":
        victim.write_text("")
    signal.alarm(120)
    try:
        with pytest.raises(ValueError, match=r"run\.lock is no plain file .*; remove it"):
            run_lock.RunLock(tmp_path).acquire()
    finally:
        signal.alarm(0)


def test_a_lock_dated_ahead_is_not_waited_for_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "STALE", 1.0)
    monkeypatch.setattr(run_lock, "_HALF_WRITTEN", 0.1)
    (tmp_path / "run.lock").write_text("nobody")
    ahead = time.time() + 10**6
    os.utime(tmp_path / "run.lock", (ahead, ahead))
    said = []
    signal.alarm(120)
    try:
        lock = run_lock.RunLock(tmp_path, said.append)
        lock.acquire()
    finally:
        signal.alarm(0)
    assert lock.is_mine() and "up to 1 s" in said[0]
    lock.release()
