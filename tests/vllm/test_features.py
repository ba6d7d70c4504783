"""What vLLM's scheduler does with the cache: pieces, shared prefixes, preemption; and refusals."""

from __future__ import annotations

import pytest

from support.vllm_cases import (
    AHEAD,
    EXACT,
    FEATURES,
    RANKS,
    REFUSED,
    SHARED_PREFIX,
    WITH_PREFIX,
    WRONG_WEIGHTS,
    feature_jobs,
)


@pytest.fixture(scope="module")
def jobs(models):
    """The jobs by name."""
    return {job["name"]: job for job in feature_jobs(models)}


@pytest.mark.parametrize("name", EXACT)
def test_tokens_are_those_of_transformers(name, engines, reference, jobs):
    result = engines[name]
    assert "error" not in result, result
    for batch, found in zip(jobs[name]["batches"], result["batches"], strict=True):
        for prompt, tokens in zip(batch, found["tokens"], strict=True):
            assert tokens == reference[FEATURES]["features"][str(prompt)][: jobs[name]["new"]]


def test_prompts_came_in_pieces_beside_decoding_sequences(engines):
    steps = engines["chunked"]["batches"][0]["steps"]
    assert max(map(sum, steps)) <= 32
    mixed = [step for step in steps if 1 in step and max(step) > 1]
    assert len(mixed) >= 5


def test_a_cached_prefix_is_not_computed_again(engines):
    first, second = engines["prefix"]["batches"]
    assert first["cached"] == [0]
    # Whole pages of 32 tokens, and never a whole prompt: its last token must be computed.
    shared = [min(n, len(SHARED_PREFIX)) for n in (100, 96, 70, 33, 20)]
    assert second["cached"] == [n // 32 * 32 for n in shared]
    prompt_tokens = sum(map(len, WITH_PREFIX))
    new = sum(len(tokens) - 1 for tokens in second["tokens"])
    assert sum(map(sum, second["steps"])) == prompt_tokens - sum(second["cached"]) + new


def test_sequences_were_preempted_and_computed_again(engines):
    assert engines["preempted"]["batches"][0]["preempted"] > 0


def test_guesses_were_verified_several_at_a_time(engines):
    steps = engines["speculative"]["batches"][0]["steps"]
    assert max(max(step) for step in steps[1:]) == 4


def test_a_layer_of_multi_token_prediction_guesses(engines, reference):
    result = engines["multi-token"]
    assert "error" not in result, result
    batch = result["batches"][0]
    assert batch["tokens"] == [run["tokens"] for run in reference[AHEAD]["prompts"]]
    # Three tokens a step and sequence: the latest and two guesses, of which some were right.
    verified = sum(rows == 3 for step in batch["steps"] for rows in step)
    new = sum(len(tokens) - 1 for tokens in batch["tokens"])
    assert new / 3 < verified < 0.85 * new


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("of-none", "the model has no layer of multi-token prediction to draft with; use"),
        ("of-another", "the drafter is another model than the served one; name the served model's"),
        ("small", "num_latent_heads of the drafter is 1 and of the served model 4; one cache has"),
        ("quantised", "quantization 'fp8' of a drafter with latent attention is not there; leave"),
    ],
)
def test_a_drafter_that_cannot_be_is_refused_in_one_line(name, said, engines):
    assert said in engines[f"drafter-{name}"]["error"]


def test_an_fp8_cache_is_small_and_that_of_the_projects_engine(engines, reference):
    result = engines["fp8"]
    assert "error" not in result, result
    # Four latents of 64 and their scales, a RoPE key of 32 in bfloat16.
    assert result["row_bytes"] == 4 * 64 + 2 * 32 + 4 * 4
    batch, engine = result["batches"][0], reference[FEATURES]["fp8"]
    assert batch["tokens"] == [run["tokens"] for run in engine]
    for ours, run in zip(batch["log_probs"], engine, strict=True):
        pairs = zip(ours[: len(run["log_probs"])], run["log_probs"], strict=True)
        assert all(abs(a - b) < 1e-4 for a, b in pairs)


def test_random_weights_serve_without_a_checkpoint(engines):
    assert "error" not in engines["dummy"], engines["dummy"]


def test_a_model_takes_as_many_tokens_as_it_has_positions(engines):
    assert {engines[name]["max_model_len"] for name in ("dummy", "MLRA-8-yarn", "MLA")} == {256}


def test_pages_hold_the_latents_of_a_rank(engines):
    # Pages of 32 tokens; four latents of 64, one RoPE key of 32, float32.
    assert engines["dummy"]["page_bytes"] == [32 * (max(4 // tp, 1) * 64 + 32) * 4 for tp in RANKS]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_in_one_line(name, engines):
    assert REFUSED[name][1] in engines[f"refused-{name}"]["error"]


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_weights_that_config_json_contradicts_are_refused(name, engines):
    assert WRONG_WEIGHTS[name][1] in engines[f"refused-{name}"]["error"]
