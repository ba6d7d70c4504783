"""The lock of extensions' builds: one builder at a time, and none that is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_mlra.training import build_lock
from megatron_mlra.training.build_lock import BuildLock
from support import ENV

HOLD = """
import sys, time
from megatron_mlra.training.build_lock import BuildLock
assert BuildLock(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_one_at_a_time(tmp_path):
    path = str(tmp_path / "lock")
    first, second = BuildLock(path), BuildLock(path)
    assert first.try_acquire() and not second.try_acquire()
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(second.wait)
        time.sleep(0.3)
        assert not waiting.done()
        first.release()
        waiting.result(timeout=60)
    assert second.try_acquire()
    second.release()
    assert not os.path.exists(path)


def test_a_killed_builder_is_not_waited_for(tmp_path):
    path = str(tmp_path / "lock")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True, env=ENV
    )
    assert holder.stdout.readline() == "held\n"
    assert not BuildLock(path).try_acquire()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert os.path.exists(path)
    later = BuildLock(path)
    assert later.try_acquire()
    later.release()


@pytest.mark.parametrize(("seconds", "taken"), [(0, False), (700, True)])
def test_a_file_of_another_programs_build(tmp_path, seconds, taken):
    path = tmp_path / "lock"
    path.touch()
    then = time.time() - seconds
    os.utime(path, (then, then))
    assert build_lock.FOREIGN == 600
    assert BuildLock(str(path)).try_acquire() is taken


@pytest.mark.parametrize("kind", ["dangling", "pipe"])
def test_a_lock_that_is_no_plain_file_is_refused(tmp_path, kind):
    path = tmp_path / "lock"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "nowhere")
    for method in (BuildLock(str(path)).try_acquire, BuildLock(str(path)).wait):
        with pytest.raises(ValueError, match="is no plain file"):
            method()
