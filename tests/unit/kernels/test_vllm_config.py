"""What vLLM's plugin refuses of a config.json that no export writes."""

from __future__ import annotations

import pytest

from megatron_mlra.checkpoint.huggingface.config import to_hf_config
from mlra_vllm.config import MLRAConfig, config_problems
from support.hf_cases import CASES
from support.vllm_cases import STRETCHED


def problems(name: str = "MLRA-4", without: str | None = None, **changes) -> list[str]:
    """What is said of one of CASES whose config.json is changed."""
    config = to_hf_config(CASES[name]) | changes
    config.pop(without, None)
    return list(config_problems(MLRAConfig(**config)))


@pytest.mark.parametrize("name", [n for n, model in CASES.items() if model.attention == "mlra"])
def test_what_is_exported_is_complete(name):
    assert problems(name) == []


@pytest.mark.parametrize(
    "name", [n for n in to_hf_config(CASES["MLRA-4"]) if n in ("kv_lora_rank", "softmax_scale")]
)
def test_a_missing_field_is_named(name):
    assert problems(without=name) == [f"config.json names no {name}; export the model again"]


def test_a_missing_field_of_experts_is_named():
    (said,) = problems("MLRA-4-experts", without="use_expert_bias")
    assert said == "config.json names no use_expert_bias; export the model again"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_branches": 0}, "num_branches is 0; it must be a whole number of at least 1"),
        ({"kv_lora_rank": "64"}, "kv_lora_rank is '64'; it must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be a whole number"),
        ({"softmax_scale": -1}, "softmax_scale is -1; it must be a positive number"),
        ({"softmax_scale": float("nan")}, "softmax_scale is nan; it must be a positive number"),
        ({"q_lora_rank": 0}, "q_lora_rank is 0; it must be null or at least 1"),
        ({"num_branches": 3}, "num_latent_heads 4 is no multiple of the 3 num_branches"),
        ({"num_branches": 8}, "num_latent_heads 4 is no multiple of the 8 num_branches"),
        ({"kv_lora_rank": 63}, "kv_lora_rank 63 is no multiple of the 4 num_latent_heads"),
        (
            {"num_attention_heads": 7, "num_branches": 1},
            "num_attention_heads 7 is no multiple of the 4 head groups",
        ),
    ],
)
def test_a_field_that_cannot_be_is_named_with_its_value(changes, said):
    assert problems(**changes)[0].startswith(f"config.json: {said}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts": "4"}, "num_experts is '4'; it must be a whole number of at least 0"),
        (
            {"num_experts_per_tok": 100},
            "num_experts_per_tok is 100; it must be at most num_experts, 5",
        ),
        (
            {"num_experts_per_tok": 0},
            "num_experts_per_tok is 0; it must be a whole number of at least 1",
        ),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is None; it must be a whole"),
        ({"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size is -1; it"),
        ({"scoring_func": "x"}, "scoring_func is 'x'; it must be softmax or sigmoid"),
        ({"routed_scaling_factor": "2"}, "routed_scaling_factor is '2'; it must be a positive"),
        ({"mlp_layer_types": ["sparse"]}, "mlp_layer_types is ['sparse']; it must name dense or"),
        ({"mlp_layer_types": [{}, {}]}, "mlp_layer_types is [{}, {}]; it must name dense or"),
    ],
)
def test_a_field_of_experts_that_cannot_be_is_named_with_its_value(changes, said):
    assert problems("MLRA-4-experts", **changes)[0].startswith(f"config.json: {said}")


def test_layers_of_multi_token_prediction_are_a_number():
    (said,) = problems(num_nextn_predict_layers="x")
    assert said.startswith("config.json: num_nextn_predict_layers is 'x'; it must be a whole")


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "default", "rope_theta": "x"}, "rope_theta 'x'; it must be a positive"),
        (
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4},
            "name no original_max_position_embeddings",
        ),
        (STRETCHED["rope_parameters"] | {"factor": "4"}, "factor '4'; it must be a positive"),
    ],
)
def test_what_rope_parameters_lack_is_named(rope, said):
    config = MLRAConfig(**to_hf_config(CASES["MLRA-4"]))
    config.rope_parameters = rope
    assert said in next(config_problems(config))


def test_a_drafter_of_another_model_is_named():
    config = MLRAConfig(**to_hf_config(CASES["MLRA-4"]))
    config.model_type = "llama"
    assert "the served one is a llama model" in next(config_problems(config))
