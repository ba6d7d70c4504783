"""Two ranks, each with its own latents in its cache, generate what one does."""

from __future__ import annotations

import pytest

from support.vllm_cases import LENGTHS, NEW, prompts

CASES = ("MLRA-4-gated-untied", "GLA-2-sigmoid-experts", "MLA")
"""Whole latents per rank; a shared latent's heads per rank, with experts; one latent for both."""


@pytest.fixture(scope="module")
def ranks(models, run_jobs):
    """Results of engines of two ranks, from one process and its workers."""
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    return run_jobs(
        [
            {
                "name": name,
                "model": str(models / name),
                "options": options,
                "batches": [prompts(*LENGTHS)],
                "new": NEW,
                "scores": True,
            }
            for name in CASES
        ],
        1200,
    )


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_generate_what_transformers_does(name, ranks, reference):
    result = ranks[name]
    assert "error" not in result, result
    runs = reference[name]["prompts"]
    assert result["batches"][0]["tokens"] == [run["tokens"] for run in runs]
    for ours, run in zip(result["batches"][0]["log_probs"], runs, strict=True):
        assert max(abs(a - b) for a, b in zip(ours, run["log_probs"], strict=True)) < 1e-4
