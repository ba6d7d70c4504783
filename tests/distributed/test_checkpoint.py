"""A checkpoint saved at TP2 in the head layout gives the same logits in every other layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.drivers.checkpoint import LOADED, MODELS


@pytest.fixture(scope="module")
def results(run_driver) -> Path:
    """Save once, load in every layout."""
    return run_driver("checkpoint", timeout=600)


@pytest.mark.parametrize("layout", LOADED)
def test_logits_survive_resharding(layout: str, results: Path) -> None:
    found = json.loads((results / f"{layout}.json").read_text())
    assert found.keys() == MODELS.keys()
    for model, error in found.items():
        assert error <= 1e-5, f"logits of {model} differ by {error:.1e} of the largest"
