"""The bar of the tools in a log and on a terminal, and how torch's threads wait."""

from __future__ import annotations

import importlib.util
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from support import ENV, ROOT

COUNT = """
import time
from megatron_mlra.command_line.progress_bar import bar
for _ in bar(range({steps}), unit="layers", desc="reading", every={every}):
    time.sleep(0.02)
"""


def count(steps: int, every: float) -> list[str]:
    return [sys.executable, "-c", COUNT.format(steps=steps, every=every)]


def test_a_log_gets_lines_and_no_carriage_return():
    done = subprocess.run(count(60, 0.3), capture_output=True, env=ENV, check=True, cwd=ROOT)
    lines = done.stderr.decode().splitlines()
    assert b"\r" not in done.stderr and 2 <= len(lines) <= 8
    assert all(line.startswith("reading: ") and "/60 layers |" in line for line in lines)
    # What is done before the first line is due says nothing.
    quick = subprocess.run(count(5, 30), capture_output=True, env=ENV, check=True, cwd=ROOT)
    assert quick.stderr == b""


def test_a_terminal_gets_a_bar():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen(count(60, 30), stderr=theirs, env=ENV, cwd=ROOT) as process:
        os.close(theirs)
        shown = b""
        try:
            while some := os.read(ours, 4096):
                shown += some
        except OSError:  # as it ends once nobody has the terminal open
            pass
        assert process.wait() == 0
    assert b"\rreading: 100%" in shown and b"60/60 layers [" in shown


@pytest.mark.parametrize(
    "code",
    [
        "from megatron_mlra.inference.cli import main; main(['nowhere', '--prompt', 'x'])",
        "from megatron_mlra.evaluation.cli import main; main(['nowhere', '--text', __file__])",
        "from megatron_mlra.checkpoint.cli import main; main(['inspect', 'nowhere'])",
    ],
    ids=["generate", "evaluate", "convert_checkpoint"],
)
def test_threads_of_tools_sleep_while_they_wait(code, tmp_path):
    # torch's libgomp itself says what it read; the rest of torch is left out.
    libgomp = Path(importlib.util.find_spec("torch").origin).parent / "lib" / "libgomp.so.1"
    (tmp_path / "tool.py").write_text(code)
    (tmp_path / "torch.py").write_text(f"import ctypes; ctypes.CDLL({str(libgomp)!r})")
    env = {name: value for name, value in ENV.items() if name != "OMP_WAIT_POLICY"}
    env |= {"OMP_DISPLAY_ENV": "TRUE", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "tool.py"]  # torch.py beside it is found first
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr, done.stderr
    env["OMP_WAIT_POLICY"] = "active"
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in done.stderr
