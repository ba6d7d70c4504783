"""A checkpoint saved at TP2 in the head layout gives the same logits in every other layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint_driver import LOADED, MODELS


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save once, load in every layout."""
    folder = tmp_path_factory.mktemp("checkpoints")
    driver = Path(__file__).with_name("checkpoint_driver.py")
    command = [sys.executable, "-W", "ignore", str(driver), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("layout", LOADED)
def test_logits_survive_resharding(layout: str, results: Path) -> None:
    found = json.loads((results / f"{layout}.json").read_text())
    assert found.keys() == MODELS.keys()
    for model, error in found.items():
        assert error <= 1e-5, f"logits of {model} differ by {error:.1e} of the largest"
