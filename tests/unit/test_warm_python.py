"""support/warm.py: what stands for Python ends as Python does, and its signals arrive."""

from __future__ import annotations

import signal
import subprocess
import sys

from support.runs import wait_for_end

PROGRAM = """
import atexit, os, sys, time
atexit.register(print, "the end")
print(__name__, sys.argv, os.getcwd(), dict(os.environ), sys.stdin.read(), sys.path[0])
sys.stdout.flush()
if sys.argv[1] == "sleep":
    time.sleep(300)
sys.exit(1 / 0 if sys.argv[1] == "error" else {"0": 0, "7": 7, "text": "said"}[sys.argv[1]])
"""


def test_it_ends_as_python_does(warm_python, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    unbuffered = ["-u", "-W", "ignore", "program.py", "error"]
    for words in (["program.py", "0"], ["-m", "program", "7"], ["-c", PROGRAM, "text"], unbuffered):
        done = [
            subprocess.run(
                [python, *words], capture_output=True, text=True, input="in", cwd=tmp_path,
                env={"HERE": "x"},
            )
            for python in (sys.executable, warm_python)
        ]  # fmt: skip
        assert done[0].returncode == done[1].returncode and done[0].stdout == done[1].stdout
        assert done[0].stderr[-20:] == done[1].stderr[-20:]


def test_its_signals_arrive(warm_python, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        said = []
        for python in (sys.executable, warm_python):
            with subprocess.Popen(
                [python, "program.py", "sleep"], cwd=tmp_path, env={"HERE": "x"}, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            ) as program:  # fmt: skip
                assert "sleep" in program.stdout.readline()
                program.send_signal(number)
                said.append((program.communicate()[0], program.returncode))
        assert said[0] == said[1] and said[0][1] == -number


LAUNCHER = """
import subprocess, sys
program = "import os, time; print(os.getpid(), flush=True); time.sleep(300)"
subprocess.run([sys.executable, "-c", program])
"""


def test_a_tree_of_a_slurm_job_ends_as_slurm_ends_it(warm_python):
    """Its root is killed, as SLURM does to all processes that descend from the job's script."""
    with subprocess.Popen(
        [warm_python, "-c", LAUNCHER], env={"SLURM_JOB_ID": "1"}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    ) as launcher:  # fmt: skip
        rank = launcher.stdout.readline().strip()
        launcher.kill()
    wait_for_end([rank], 20)
