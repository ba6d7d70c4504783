"""The proof of tests/gpu/test_two_gpus.py, rehearsed on two gloo ranks in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.drivers.two_gpus import Case, compare, rehearsed_cases, verdict


@pytest.fixture(scope="module")
def results(run_driver) -> Path:
    """Run the rehearsal once."""
    return run_driver("two_gpus", timeout=300)


@pytest.mark.parametrize("case", rehearsed_cases(), ids=str)
def test_two_ranks_train_as_one(case: Case, results: Path) -> None:
    found = json.loads((results / f"{case}.json").read_text())
    assert "failed" not in found, found["failed"]
    assert not verdict(case, found), verdict(case, found)
    assert len(found["gradients"]) >= 10
    assert max(to_one for to_one, _, _ in found["gradients"].values()) <= 1e-5
    assert max(found["loss"], found["grad_norm"]) <= 1e-5
    assert found["steps"][0] <= 1e-4


def test_a_gradient_that_lacks_a_rank_is_found() -> None:
    import torch

    draw = torch.Generator().manual_seed(1)
    true = torch.randn(64, generator=draw)
    ones = true + 0.01 * torch.randn(64, generator=draw)

    def step(gradient: torch.Tensor) -> dict:
        return {"gradients": {"w": gradient}, "loss": [2.0, 1.0], "grad_norm": [1.0, 1.0]}

    def judge(gradient: torch.Tensor) -> str:
        exact = {"gradients": {"w": true}, "weights": {}}
        return verdict(Case("bf16", "tp2"), compare(step(gradient), step(ones), exact, {}))

    assert not judge(true + 0.01 * torch.randn(64, generator=draw))
    halved = true.clone()
    halved[:16] = 0
    assert "gradient of w is" in judge(halved)
    assert "gradient of w is inf" in judge(torch.full((64,), float("nan")))
