"""The launcher's process ends with the launcher's exit code, whatever its threads do."""

import subprocess
import sys

import pytest

from support import ENV, ROOT

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
    ("variables", "conf", "said"),
    [
        ({"STOPPED_CODE": "abc"}, "", "error: STOPPED_CODE abc is no exit code; give 0 to 255\n"),
        ({"STOPPED_CODE": "300"}, "", "error: STOPPED_CODE 300 is no exit code; give 0 to 255\n"),
        ({}, "nan", "error: --rdzv-conf join_timeout=nan is no number of seconds above 0;"),
        ({}, "soon", "error: --rdzv-conf join_timeout=soon is no number of seconds above 0;"),
    ],
)
def test_numbers_of_the_launcher(variables, conf, said):
    words = ["--nnodes", "2", "--rdzv-id", "1", "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", "127.0.0.1:1", "--rdzv-conf", f"join_timeout={conf}"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_mlra.launch", *words, "-m", "nothing"],
        capture_output=True, text=True, env=ENV | variables, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith(said), done.stderr
    assert done.stderr.count("\n") == 1
