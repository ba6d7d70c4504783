"""vLLM generates what transformers generates, for every variant, token for token."""

from __future__ import annotations

import pytest

from support.vllm_cases import CASES, NEW


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_transformers(name, engines, reference):
    result = engines[name]
    assert "error" not in result, result
    tokens = result["batches"][0]["tokens"]
    assert tokens == [run["tokens"] for run in reference[name]["prompts"]]
    assert {len(new) for new in tokens} == {NEW}


@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_are_those_of_transformers(name, engines, reference):
    for ours, run in zip(
        engines[name]["batches"][0]["log_probs"], reference[name]["prompts"], strict=True
    ):
        assert len(ours) == len(run["log_probs"])
        assert max(abs(a - b) for a, b in zip(ours, run["log_probs"], strict=True)) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_a_row_holds_latents_and_one_rope_key(name, engines):
    model, result = CASES[name], engines[name]
    if model.attention == "mlra":
        assert result["row_bytes"] == 4 * (model.kv_lora_rank + model.qk_rope_head_dim)
    else:
        # vLLM's own Llama: the plugin has no part in it.
        assert "row_bytes" not in result
