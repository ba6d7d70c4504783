"""What the launcher is told is checked before any rank starts: one line, exit code 2."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support import ENV

ALONE = ("--standalone",)
WRONG = {
    (
        *ALONE,
        "--nproc-per-node",
        "0",
        "x.py",
    ): "--nproc-per-node 0 is no number of processes; use 1",
    (*ALONE, "--nproc-per-node", "-1", "x.py"): "--nproc-per-node -1 is no number of processes",
    (
        *ALONE,
        "--nproc-per-node",
        "1025",
        "x.py",
    ): "--nproc-per-node 1025 is too many; use at most 1",
    (*ALONE, "--nproc-per-node", "two", "x.py"): "--nproc-per-node two is no number of processes",
    (*ALONE, "--nproc-per-node", "gpu", "x.py"): "--nproc-per-node gpu: Cuda is not available",
    ("--nnodes", "2", "--rdzv-endpoint", "x:1", "--nproc-per-node", "0", "x.py"): "is no number of",
    (*ALONE, "--max-restarts", "-1", "x.py"): "--max-restarts is -1; it must be at least 0",
    (*ALONE, "--monitor-interval", "0", "x.py"): "--monitor-interval is 0; it must be above 0",
    (*ALONE, "--monitor-interval", "nan", "x.py"): "--monitor-interval is nan; it must be above 0",
    (*ALONE, "--log-dir", "/proc/x", "x.py"): "--log-dir /proc/x cannot be made (No such file or",
    (*ALONE, "--log-dir", "x.py", "x.py"): "--log-dir x.py cannot be made (File exists)",
    (*ALONE, "--redirects", "9", "x.py"): "--redirects 9: ",
    (*ALONE, "--tee", "0:x", "x.py"): "--tee 0:x: ",
    (*ALONE, "--local-ranks-filter", "0,a", "x.py"): "--local-ranks-filter 0,a is no list of ranks",
    (*ALONE, "gone.py"): "there is no script gone.py",
    (
        *ALONE,
        "pretrain",
        "--config",
        "debug",
    ): "no script pretrain; start it as --no-python mlra pr",
    ("mlra", "pretrain"): "there is no script mlra; put --no-python in front of it",
    (*ALONE, "--no-python", "gone"): "there is no program gone; name one of the PATH, or a file",
    (*ALONE, "--no-python", "./x.py"): "./x.py cannot be run: it is not executable",
    (*ALONE, "-m", "no.such"): "there is no module no.such",
    (*ALONE, "-m", "megatron_mlra.trainng"): "there is no module megatron_mlra.trainng",
    (*ALONE, "-m", "--no-python", "x.py"): "--no-python and -m exclude each other; leave one out",
}


@pytest.mark.parametrize("argv", WRONG, ids=" ".join)
def test_what_cannot_be_started_is_refused(argv, warm_python, tmp_path):
    (tmp_path / "x.py").write_text("open('ran', 'w').close()\n")
    env = ENV | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [warm_python, "-m", "megatron_mlra.launch", *argv],
        capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if not line.startswith("loading ")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and WRONG[argv] in lines[0], lines
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("variable", "line"),
    [
        ({"PET_STANDALONE": "true"}, "PET_STANDALONE is 'true'; set it to 1 or 0, or unset it"),
        ({"PET_NNODES": "2"}, "--standalone is one host, and --nnodes (PET_NNODES) is 2; leave"),
    ],
)
def test_variables_for_torchrun_that_another_launcher_left(variable, line, warm_python, tmp_path):
    """As an operator of Kubernetes sets them; examples/launch.sh leaves them out."""
    (tmp_path / "x.py").write_text("import os\nprint(os.environ['WORLD_SIZE'])\n")
    start = [warm_python, "-m", "megatron_mlra.launch", "--standalone", "x.py"]
    done = subprocess.run(
        start, capture_output=True, text=True, env=ENV | variable, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 2 and line in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words", [["x.py"], ["-m", "x"], ["-m", "package.inner"], ["--no-python", "./x"], ["folder"]]
)
def test_what_can_be_started_is(words, warm_python, tmp_path):
    said = "import os\nprint('said', os.environ['RANK'])\n"
    for name in ("x.py", "package/inner.py", "folder/__main__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(said)
    (tmp_path / "x").write_text("#!/bin/sh\necho said $RANK\n")
    (tmp_path / "x").chmod(0o755)
    done = subprocess.run(
        [warm_python, "-m", "megatron_mlra.launch", "--standalone", *words],
        capture_output=True, text=True, env=ENV, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "said 0\n"), done.stderr


def test_a_rank_that_ends_with_2_and_no_reason_is_named(warm_python, tmp_path):
    """As a command of others does at a wrong flag, which it has said itself."""
    (tmp_path / "x.py").write_text("import sys; sys.exit(2)\n")
    done = subprocess.run(
        [warm_python, "-m", "megatron_mlra.launch", "--standalone", "x.py"],
        capture_output=True, text=True, env=ENV | {"PYTHON_EXEC": sys.executable}, cwd=tmp_path,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: rank 0 ended with exit code 2; not started again"
