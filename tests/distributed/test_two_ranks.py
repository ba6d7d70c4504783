"""The proof of tests/gpu/test_two_gpus.py, rehearsed on two gloo ranks in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.changed_gradients import NOISE
from support.drivers.two_gpus import BANDS, Case, compare, rehearsed_cases, verdict


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


def test_the_table_of_all_cases_is_written_where_all_are_right(results: Path) -> None:
    told = json.loads((results / "all.json").read_text())["cases"]
    assert [*told] == [str(case) for case in rehearsed_cases()]
    assert all(found["worst_gradient"] <= 1e-5 for found in told.values())
    for name, found in told.items():
        losses = json.loads((results / f"{name}.json").read_text())["losses"]
        assert found["losses"] == len(losses) >= 3


def changed(results: Path, name: str) -> tuple[dict, str]:
    """What was measured of one rank whose gradients were changed, and what is said of it."""
    found = json.loads((results / f"bf16-{name}.json").read_text())
    assert "failed" not in found, found["failed"]
    return found, verdict(Case("bf16", name), found)


def test_losses_pass_with_room_where_gradients_are_rounded(results: Path) -> None:
    found, said = changed(results, "noise")
    assert min(to_one for to_one, _, _ in found["gradients"].values()) > 0.9 * NOISE
    assert found["steps"][0] < BANDS["bf16"] / 3
    assert "losses of step" not in said


def test_a_doubled_gradient_is_found(results: Path) -> None:
    assert (
        "gradient of decoder.layers.self_attention.linear_proj.weight is 1.0e+00 from one"
        in (changed(results, "double")[1])
    )


@pytest.mark.parametrize("name", ["stop", "flip"])
def test_a_fault_behind_the_first_step_is_found_by_losses(name: str, results: Path) -> None:
    found, said = changed(results, name)
    assert found["steps"][0] > 2 * BANDS["bf16"]
    assert said.startswith("losses of step") and ";" not in said


def test_losses_near_zero_are_compared_in_nats() -> None:
    import torch

    step = {"gradients": {"w": torch.ones(4)}, "grad_norm": [1.0, 1.0]}
    exact = {"gradients": {"w": torch.ones(4)}, "weights": {}}
    found = compare(step | {"loss": [9.0, 0.002]}, step | {"loss": [9.0, 0.004]}, exact, {})
    assert not verdict(Case("bf16", "again"), found)


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
