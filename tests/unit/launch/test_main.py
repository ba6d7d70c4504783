"""The launcher's process ends with the launcher's exit code, whatever its threads do."""

import signal
import subprocess
import sys
import time

import pytest

from megatron_mlra.description.presets import find_preset
from megatron_mlra.launch.control import ONE_PRESS
from support import ENV, ROOT
from support.runs import runs_still, wait_for

IN_A_REQUEST = """
import runpy, threading, time
from datetime import timedelta
from torch.distributed import TCPStore
from megatron_mlra.launch import cli

def main(argv):
    def ask():
        store.wait(["never"], timedelta(seconds=1.5))

    second = timedelta(seconds=9)
    store = TCPStore("127.0.0.1", 0, None, True, second, wait_for_workers=False)
    threading.Thread(target=ask, daemon=True).start()
    time.sleep(0.2)
    print("said")
    {end}

cli.main = main
runpy.run_module("megatron_mlra.launch", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [("return 2", 2, ""), ("raise SystemExit(2)", 2, ""), ("1 / 0", 1, "ZeroDivisionError")],
)
def test_a_thread_in_a_request_to_the_store(end, code, said):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_A_REQUEST.format(end=end)],
        capture_output=True, text=True, env=ENV, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "said\n"), done.stderr
    assert said in done.stderr and "terminate called" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "flags", "line"),
    [
        ({"STOPPED_CODE": "abc"}, [], "STOPPED_CODE is 'abc'; give an exit code, 0 to 255"),
        ({"STOPPED_CODE": "256"}, [], "STOPPED_CODE is '256'; give an exit code, 0 to 255"),
        (
            {},
            ["--rdzv-conf", "join_timeout=nan"],
            "JOIN_TIMEOUT (join_timeout) is 'nan'; give seconds, at most 1,000,000",
        ),
    ],
)
def test_numbers_that_are_none_are_refused(changes, flags, line, warm_python):
    meeting = ["--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:29555", "--rdzv-id", "x"]
    command = [warm_python, "-W", "ignore", "-m", "megatron_mlra.launch"]
    command += [*(meeting if flags else []), *flags, "pretrain_mlra.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ENV | changes, cwd=ROOT, timeout=120
    )
    assert (done.returncode, done.stderr) == (2, f"error: {line}\n")


def test_one_host_needs_no_flag_that_says_so(tmp_path, warm_python):
    (tmp_path / "rank.py").write_text("import os\nprint(os.environ['WORLD_SIZE'])\n")
    command = [warm_python, "-W", "ignore", "-m", "megatron_mlra.launch", tmp_path / "rank.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@pytest.mark.parametrize("is_there", [True, False])
def test_a_local_file_called_as_a_preset_is_what_is_trained_by(tmp_path, is_there):
    """The Python is a stand-in that says what it is given."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    if is_there:
        (tmp_path / "debug").write_text("lr: 1e-3\n")
    done = subprocess.run(
        ["bash", ROOT / "examples/launch.sh", "debug", "save"], cwd=tmp_path,
        capture_output=True, text=True, env=ENV | {"PYTHON": str(python)}, timeout=60,
    )  # fmt: skip
    words = done.stdout.split()
    preset = words[words.index("--config") + 1]
    found = find_preset(preset, tmp_path)
    assert found == (tmp_path / "debug" if is_there else ROOT / "megatron_mlra/presets/debug.yaml")


def test_a_suspended_launcher_heeds_signals_when_it_goes_on(tmp_path):
    """As `scontrol suspend` and `resume`, or a debugger, do to every process."""
    (tmp_path / "rank.py").write_text(
        "import signal, time\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        "print('up', flush=True)\n"
        "signal.sigwait({signal.SIGTERM})\n"
        "print('saved', flush=True)\n"
    )
    out = tmp_path / "out.txt"
    command = [sys.executable, "-W", "ignore", "-m", "megatron_mlra.launch", tmp_path / "rank.py"]
    with out.open("w") as file:
        launcher = subprocess.Popen(command, env=ENV, cwd=ROOT, stdout=file, stderr=file)
    wait_for(out, "up", 120)
    for _ in range(2):
        launcher.send_signal(signal.SIGSTOP)
        time.sleep(1)  # longer than the launcher waits for a signal at a time
        launcher.send_signal(signal.SIGCONT)
        time.sleep(0.1)
    launcher.send_signal(signal.SIGUSR1)
    try:
        assert launcher.wait(30) == 0
    finally:
        launcher.kill()
    assert out.read_text() == "up\nsaved\n"


def test_a_second_interrupt_ends_ranks_that_go_on(tmp_path):
    """A rank that is asked to stop, and saves for hours."""
    rank, out = tmp_path / "rank.py", tmp_path / "out.txt"
    rank.write_text(
        "import os, signal, time\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})\n"
        "print('up', os.getpid(), flush=True)\n"
        "signal.sigwait({signal.SIGTERM})\n"
        "print('saving', flush=True)\n"
        "time.sleep(3600)\n"
    )
    command = [sys.executable, "-W", "ignore", "-m", "megatron_mlra.launch", "--standalone"]
    with out.open("w") as file:
        launcher = subprocess.Popen(
            [*command, rank], env=ENV, cwd=ROOT, stdout=file, stderr=file,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    wait_for(out, "up ", 120)
    for _ in range(2):  # as `timeout -s INT` does, which is one request
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.02)
    wait_for(out, "saving", 120)
    time.sleep(ONE_PRESS)
    assert launcher.poll() is None, out.read_text()
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(120) == 130, out.read_text()
    loading, up, *said = out.read_text().splitlines()
    assert loading.startswith("loading PyTorch: ")
    assert [line.partition(";")[0] for line in said] == [
        "note: stopping in order",
        "saving",
        "error: ended at once by a second Ctrl-C",
    ]
    assert not runs_still(up.split()[1])
