"""How a process ends from another thread than the main one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support import ENV

KILLED = """
import multiprocessing, signal, threading, time
from megatron_mlra.training.ending import EndByInterrupt

def raise_error(*_):
    raise RuntimeError("a data loader is killed")

if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, raise_error)
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()
    end = EndByInterrupt()
    end.before = lambda: time.sleep(0.5)  # long enough for the main thread to see the signal
    threading.Thread(target=end).start()
    while True:
        time.sleep(0.01)
"""


def test_helpers_that_are_killed_raise_nothing_in_the_main_thread():
    command = [sys.executable, "-c", KILLED]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=60)
    assert done.stderr == "error: ended at once by a second Ctrl-C\n"
    assert done.returncode == 130


INTERRUPTED = """
import signal, sys
from megatron_mlra.training import cli, {module}
{module}.{function} = lambda *_: signal.raise_signal(signal.SIGINT)
sys.argv = ["mlra pretrain", "--config", "debug", "--mock-data"]
cli.start()
"""


@pytest.mark.parametrize(("module", "function"), [("flags", "answer"), ("early_checks", "check")])
def test_a_ctrl_c_before_the_run_begins_is_one_line(module, function):
    command = [sys.executable, "-c", INTERRUPTED.format(module=module, function=function)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=60)
    assert done.stderr.endswith("error: interrupted\n") and "Traceback" not in done.stderr
    assert done.returncode == 130
