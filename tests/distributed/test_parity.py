"""Every parallel layout trains as one rank does: loss, every gradient, grad norm, replicas.

All cases run in real gloo processes of one driver, support/drivers/parity.py, which imports
Megatron once.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from support.drivers.parity import STEPS, Case, _file, cases

GRADIENT_TOLERANCE = 1e-5
"""Largest gradient difference over the largest gradient of the same parameter."""


@pytest.fixture(scope="module")
def results(run_driver) -> Path:
    """Run all cases once."""
    return run_driver("parity", timeout=900)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_layout_trains_as_one_rank(case: Case, results: Path) -> None:
    result = json.loads((results / f"{_file(case.name)}.json").read_text())
    assert "failed" not in result, result["failed"]
    assert result["num_gradients"] >= 8
    name, worst = max(result["gradients"].items(), key=lambda item: item[1])
    assert worst <= GRADIENT_TOLERANCE, f"gradient of {name} is off by {worst:.1e}"
    assert result["loss"] <= 1e-5, f"losses of {STEPS} steps are off by {result['loss']:.1e}"
    assert result["grad_norm"] <= 1e-5, f"grad norm is off by {result['grad_norm']:.1e}"
    assert not result["replicas"], f"replicas differ after {STEPS} steps: {result['replicas'][:3]}"


@pytest.mark.parametrize("model", ["MLRA-4 MTP", "MLRA-4 MTP odd documents"])
def test_multi_token_prediction_is_its_definition(model: str, results: Path) -> None:
    expected = torch.load(results / f"{_file(model)}-oracle.pt")
    actual = torch.load(results / f"{_file(model)}.pt")["steps"][0]["gradients"]
    assert actual.keys() == expected.keys()
    assert any(name.startswith("mtp.layers.1.") for name in expected)
    for name, gradient in expected.items():
        difference = (actual[name] - gradient).abs().max() / gradient.abs().max()
        assert difference <= GRADIENT_TOLERANCE, f"gradient of {name} is off by {difference:.1e}"
