"""Cached decoding equals the full forward, for every variant, on 1, 2, 4 and 8 ranks.

All cases run in one driver, which imports Megatron once (support/drivers/inference.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.decoded_models import MODELS
from support.drivers.inference import parallel_cases

TOLERANCE = 1e-4
"""Largest difference of a logit; logits are of order 1."""
FP8_TOLERANCE = 0.08
"""Relative error of logits over an FP8 cache: e4m3 keeps three bits behind the point."""


@pytest.fixture(scope="module")
def results(run_driver) -> Path:
    """Run all cases once."""
    return run_driver("inference", timeout=900)


def read(results: Path, case: str, rank: int = 0) -> dict:
    """A case's differences."""
    result = json.loads((results / f"{case}-{rank}.json").read_text())
    assert "failed" not in result, result["failed"]
    return result


@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_equals_full_forward(name: str, results: Path) -> None:
    worst = read(results, f"1-{name}")
    assert set(worst) == {"prefill", "lengths", "ragged", "reuse"}
    assert max(worst.values()) <= TOLERANCE, worst


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.num_experts])
def test_steps_of_experts_that_can_be_captured(name: str, results: Path) -> None:
    assert max(read(results, f"static-{name}").values()) <= TOLERANCE


@pytest.mark.parametrize(("tp", "name", "mode"), parallel_cases(), ids=lambda value: str(value))
def test_ranks_agree_with_full_forward(tp: int, name: str, mode: str, results: Path) -> None:
    for rank in range(tp):
        worst = read(results, f"{tp}-{name}-{mode}", rank)
        bytes_per_token = worst.pop("bytes_per_token")
        assert worst.pop("all_reduce") == "gloo: one-shot needs GPUs, this is cpu"
        assert set(worst) == {"prefill", "ragged", "reuse"}
        assert max(worst.values()) <= TOLERANCE, worst
        if MODELS[name].attention == "mlra":
            assert bytes_per_token == 2 * 4 * numbers_a_token(name, tp)


def test_ranks_without_gpus_agree_that_their_memory_cannot_be_mapped(results: Path) -> None:
    for rank in range(2):
        assert read(results, "joining", rank)["said"] == "rank 0: the device is cpu, no GPU"


def numbers_a_token(name: str, tp: int) -> int:
    """What a rank caches of a token and layer: its latents, shared ones whole, and the RoPE key."""
    model = MODELS[name]
    latents = max(1, model.num_latent_heads // tp)
    return latents * model.kv_lora_rank // model.num_latent_heads + model.qk_rope_head_dim


def test_routing_is_megatrons_to_the_bit(results: Path) -> None:
    same = read(results, "routing")
    assert len(same) == 6 and all(same.values()), same


@pytest.mark.parametrize("name", ["MLRA-4", "MLA"])
def test_fp8_cache_stays_close(name: str, results: Path) -> None:
    error = read(results, f"fp8-{name}")["fp8"]
    assert 1e-4 < error <= FP8_TOLERANCE
