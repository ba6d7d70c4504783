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
