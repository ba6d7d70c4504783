"""Megatron's flags of memory and overlap change how a step runs, not what it computes."""

from __future__ import annotations

import json

import pytest

from support.drivers.memory_flags import LAYOUTS, OFFLOAD, STRATEGIES, VARIATIONS

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def results(run_driver):
    folder = run_driver("memory_flags", timeout=400)
    names = ("fsdp", "experts", *LAYOUTS)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def close(found: list[list[float]], expected: list[list[float]]) -> None:
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == pytest.approx(theirs, rel=TOLERANCE), f"step {step}"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_megatron_fsdp_trains_as_plain_data_parallel(strategy, results):
    fsdp = results["fsdp"]
    assert "failed" not in fsdp, fsdp["failed"]
    close(fsdp[strategy], fsdp["plain"])


@pytest.mark.parametrize("variation", VARIATIONS)
def test_a_mixture_of_experts_trains_as_without(variation, results):
    experts = results["experts"]
    assert "failed" not in experts, experts["failed"]
    assert experts[variation]["gradients"] <= TOLERANCE
    close(experts[variation]["steps"], experts["plain"]["steps"])


def test_offloading_changes_no_bit_and_moves_every_module(results):
    experts = results["experts"]
    assert experts["offloading"] == experts["plain"]
    assert set(experts["offloaded"]) == set(OFFLOAD["offload_modules"])
    assert min(experts["offloaded"].values()) > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offloading_changes_no_bit_of_any_layout(layout, results):
    found = results[layout]
    assert "failed" not in found, found["failed"]
    assert not found["differing"]
    assert found["offloading"] == found["plain"]
