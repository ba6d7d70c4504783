"""tools/compare_losses.py: what it reads, its table, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert "| bf16 | 2.5000 | +0.00 % | 4.0000 | +0.00 % |" in run.stdout
    assert "| fp8 | 2.5500 | +2.00 % |  |  |" in run.stdout
    assert json.loads(out.read_text())["bf16"] == {"losses": [*many, 2.0], "validation": 4.0}
    assert (tmp_path / "out.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("losses", "first", "last", "message"),
    [
        ([], 1, 1, "has no line like"),
        ([1.0], 10, 1, "train with --log-interval 1"),
        ([1.0], 1, 2, "--last 2"),
    ],
)
def test_refusals(tmp_path, losses, first, last, message):
    file = log(tmp_path / "a", losses, None, first)
    run = compare(f"a={file}", "--last", last)
    assert run.returncode != 0
    assert message in run.stderr.splitlines()[-1]


def test_a_run_without_a_file(tmp_path):
    assert "use NAME=FILE" in compare("a").stderr
    assert "No such file" in compare(f"a={tmp_path / 'none'}").stderr
