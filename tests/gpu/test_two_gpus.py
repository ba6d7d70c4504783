"""Two GPUs of one host train as one does: Transformer Engine's layers over NCCL in every layout.

python -m pytest -m gpu tests/gpu/test_two_gpus.py

All cases run in one launch of support/drivers/two_gpus.py, which also runs without pytest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from support import ENV, ROOT
from support.drivers.two_gpus import STEPS, Case, cases, verdict
from support.runs import run_to_end

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2,
        reason=f"needs two GPUs of one host, and torch sees {torch.cuda.device_count()}",
    ),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Run all cases once."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "3", "-m", "support.drivers.two_gpus"]
    command += [folder / "results", folder / "scratch"]
    run = run_to_end(command, 560, env=ENV, cwd=ROOT)
    assert run.returncode == 0
    return folder / "results"


@pytest.mark.parametrize("case", cases(), ids=str)
def test_two_gpus_train_as_one(case: Case, results: Path) -> None:
    found = json.loads((results / f"{case}.json").read_text())
    assert "failed" not in found, found["failed"]
    assert not verdict(case, found), verdict(case, found)
    assert len(found["losses"]) == STEPS
