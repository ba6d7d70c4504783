"""Every parallel layout trains as one rank does: loss, every gradient, grad norm, replicas.

All cases run in real gloo processes of one driver, support/drivers/parity.py, which imports
Megatron once.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from support.drivers.parity import COPIES, STEPS, Case, _file, cases

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
    if "largest" in result:
        assert result["largest"] <= 1e-5, f"largest logits are off by {result['largest']:.1e}"
    if "clipped" in result:
        assert result["heads"][0] == result["heads"][1] > 0
        assert result["clipped"] <= 1e-5, f"clipped weights are off by {result['clipped']:.1e}"
    assert ("largest" in result, "clipped" in result) == measured_as(case.reference)
    assert not result["replicas"], f"replicas differ after {STEPS} steps: {result['replicas'][:3]}"


def measured_as(model: str) -> tuple[bool, bool]:
    """Whether the largest logits of a model are known, and whether QK-clip is for it."""
    return model != "GQA", model not in ("GQA", "GTA", "MFA", "TPA")


@pytest.mark.parametrize("name", COPIES)
def test_a_clip_reaches_the_copies_of_weights(name: str, results: Path) -> None:
    found = torch.load(results / "copies.pt")
    start, clipped, renewed = found[name]["weights"]
    assert found[name]["heads"] > 0 and found[name]["alike"]
    before, after = found[name]["largest"]
    assert max(after) < 0.9 * max(before)
    for weight, plain in zip(found[name]["weights"], found["plain"]["weights"], strict=True):
        assert all(torch.equal(weight[key], plain[key]) for key in plain)
    for key, weight in renewed.items():
        # To the rounding of bf16: the weights were scaled rounded, their copies before rounding.
        assert torch.allclose(weight, clipped[key], rtol=2**-7, atol=0), key
    for key in start:
        if "up_proj" in key:  # by more than the step did
            moved = (clipped[key] - start[key]).abs().max() / start[key].abs().max()
            assert moved > 0.02, f"{key} moved by {moved:.3f}"


@pytest.mark.parametrize("model", ["MLRA-4 MTP", "MLRA-4 MTP odd documents"])
def test_multi_token_prediction_is_its_definition(model: str, results: Path) -> None:
    expected = torch.load(results / f"{_file(model)}-oracle.pt")
    actual = torch.load(results / f"{_file(model)}.pt")["steps"][0]["gradients"]
    assert actual.keys() == expected.keys()
    assert any(name.startswith("mtp.layers.1.") for name in expected)
    for name, gradient in expected.items():
        difference = (actual[name] - gradient).abs().max() / gradient.abs().max()
        assert difference <= GRADIENT_TOLERANCE, f"gradient of {name} is off by {difference:.1e}"
