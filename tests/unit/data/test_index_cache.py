"""One cache folder, two processes of two runs at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from megatron_mlra.data import index_cache

# Builds slowly, so that both are in it at once; says what it built, and what it got.
RUN = """
import fcntl, json, os, sys, time
from pathlib import Path
import numpy as np
from megatron_mlra.data import index_cache
folder, start, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if mode == "no locks":
    def refuse(*_):
        raise OSError("no locks here")
    index_cache.fcntl.flock = refuse
if mode == "one process number":
    index_cache.fcntl.flock = lambda *_: None
    os.getpid = lambda: 7
    name = type("Name", (), {"nodename": sys.argv[4]})
    os.uname = lambda: name
built = []
def build():
    built.append(1)
    time.sleep(600 if mode == "one is killed" and sys.argv[4] == "one" else 0.5)
    return tuple(np.arange(200_000) * factor for factor in (1, 2, 3))
open(start.with_name(f"ready-{sys.argv[4]}"), "w").close()
while not start.exists():
    time.sleep(0.001)
said = []
for _ in range(3):
    arrays = index_cache.cached(folder, "key", ("a", "b", "c"), build, said.append)
    assert all((array == np.arange(200_000) * f).all() for f, array in enumerate(arrays, 1))
print(json.dumps({"built": len(built), "said": said}))
"""


def start_two(tmp_path, mode):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, tmp_path / "cache", tmp_path / "start", mode, name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert all(run.poll() is None for run in runs), runs[0].communicate()
        time.sleep(0.01)
    (tmp_path / "start").touch()
    return runs


@pytest.mark.parametrize("mode", ["locks", "no locks", "one process number"])
def test_both_get_the_arrays_and_leave_whole_files(tmp_path, mode):
    """'one process number': two hosts, whose locks do not meet and whose processes have one id."""
    results = []
    for run in start_two(tmp_path, mode):
        out, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
        results.append(json.loads(out))
    assert [result["said"] for result in results] == [[], []]
    built = sum(result["built"] for result in results)
    assert built == 1 if mode == "locks" else 1 <= built <= 2
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    arrays = {f"key-{name}.npy" for name in "abc"}
    assert names == {*arrays, "key-sha256.json", "key.lock"}
    for factor, name in enumerate(sorted(arrays), 1):
        assert (np.load(tmp_path / "cache" / name) == np.arange(200_000) * factor).all()


def test_one_that_is_killed_leaves_nothing_that_the_other_trusts(tmp_path):
    one, two = start_two(tmp_path, "one is killed")
    time.sleep(0.2)  # it builds, or waits for the other to
    one.send_signal(signal.SIGKILL)
    one.wait()
    out, err = two.communicate(timeout=120)
    assert two.returncode == 0, err
    assert json.loads(out) == {"built": 1, "said": []}


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_that_is_no_plain_file_is_left_alone(tmp_path, kind):
    lock, victim = tmp_path / "key.lock", tmp_path / "victim"
    if kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(victim)
    (array,) = index_cache.cached(tmp_path, "key", ("a",), lambda: (np.arange(3),), print)
    assert array.tolist() == [0, 1, 2] and not victim.exists()
