"""tools/compare_losses.py: what it reads, its table, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mlra.benchmarks.losses_files import read
from megatron_mlra.command_line import parser
from support import ROOT

TOOL = ROOT / "tools" / "compare_losses.py"


def compare(*argv: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *map(str, argv)], capture_output=True, text=True)


def log(path: Path, losses: list[float], validation: float | None, first: int = 1) -> Path:
    lines = [f"step {i:,}/1,500 | lm loss {x:.4f} | lr 1" for i, x in enumerate(losses, first)]
    if validation is not None:
        lines += [
            "validation at step 1,200: lm loss 9.0",
            f"validation at step 1,500: lm loss {validation}",
        ]
    path.write_text("\n".join(["training", *lines, ""]))
    return path


def test_differences_to_the_first_run(tmp_path):
    many = [3.0] * 1499
    a, b = log(tmp_path / "a", [*many, 2.0], 4.0), log(tmp_path / "b", [*many, 2.1], None)
    out = tmp_path / "out.json"
    run = compare(
        f"bf16={a}", f"fp8={b}", "--last", 2, "--json", out, "--png", tmp_path / "out.png"
    )
    assert run.returncode == 0, run.stderr
    assert "| bf16 | 1,499 to 1,500 | 2.5000 | +0.00 % | 4.0000 | +0.00 % |" in run.stdout
    assert "| fp8 | 1,499 to 1,500 | 2.5500 | +2.00 % |  |  |" in run.stdout
    stored = json.loads(out.read_text())["bf16"]
    assert stored["losses"] == [*many, 2.0] and stored["validation"] == 4.0
    assert (tmp_path / "out.png").read_bytes()[1:4] == b"PNG"
    again = compare(out, "--last", 2)
    assert again.returncode == 0 and again.stdout == run.stdout


def test_means_of_intervals(tmp_path):
    """Runs of the default --log-interval: the last lines, and what steps they stand for."""
    text = "".join(
        f"step {step}/60 | lm loss {loss:.4f} | grad norm 1.00\n  9 tokens/s | 1 s left\n"
        for step, loss in ((10, 5.0), (20, 4.0), (30, 3.0), (40, 2.5), (50, 2.0), (60, 1.0))
    )
    (tmp_path / "tens.txt").write_text(f"step 1/60 | lm loss 6.0000 | lr 1\n{text}")
    log(tmp_path / "each", [3.0] * 40 + [2.2] * 20, None)
    # What was trained once more behind a checkpoint counts once.
    (tmp_path / "again.txt").write_text(text + "step 60/60 | lm loss 1.2000 | lr 1\n")
    runs = [f"{name}={tmp_path / name}" for name in ("tens.txt", "each", "again.txt")]
    run = compare(*runs, "--last", 25)
    assert run.returncode == 0, run.stderr
    assert "| tens.txt | 41 to 60 | 1.5000 | +0.00 % |" in run.stdout
    assert "| each | 36 to 60 | 2.3600 |  |" in run.stdout
    assert "| again.txt | 41 to 60 | 1.6000 | +6.67 % |" in run.stdout
    assert "Means of other steps than the first run's are not compared" in run.stdout


@pytest.mark.parametrize(
    ("losses", "last", "message"),
    [
        ([], 1, "has no line like"),
        ([1.0], 2, "--last 2: a has 1 steps; use at most that"),
        ([1.0], 0, "--last: 0 is no whole"),
    ],
)
def test_refusals(tmp_path, losses, last, message):
    run = compare(f"a={log(tmp_path / 'a', losses, None)}", "--last", last)
    assert run.returncode == 2
    assert message in run.stderr.splitlines()[-1]
    (tmp_path / "empty").mkdir()
    assert "holds no event file" in compare(f"a={tmp_path / 'empty'}").stderr


def test_a_log_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(parser, "TEXT_BYTES", 2_000_000)
    with pytest.raises(ValueError, match=r"^/dev/zero has more than 2 MB; give a part of it$"):
        read(Path("/dev/zero"))


def test_a_run_without_a_file(tmp_path):
    assert "use NAME=FOLDER, NAME=FILE or" in compare("a").stderr
    assert "No such file" in compare(f"a={tmp_path / 'none'}").stderr
    run = log(tmp_path / "a", [1.0], None)
    twice = compare(f"a={run}", f"a={run}", "--last", 1)
    assert twice.returncode == 2 and f"a={run}: a names another run already" in twice.stderr
