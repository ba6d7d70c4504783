"""Which arguments make two models different: by the one description, whatever fields it has."""

from __future__ import annotations

import dataclasses
from argparse import Namespace

import pytest

from megatron_mlra.description.megatron_args import (
    _NOT_COMPARED,
    ROPE_ARGUMENTS,
    differing_arguments,
    to_megatron_args,
)
from megatron_mlra.description.model import CheckpointError, ModelDescription
from support.random_checkpoint import grouped, latent

EXPERTS = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_layer_pattern": (0, 1),
    "moe_router_score_function": "sigmoid",
}
MODELS = {
    "latent": latent(4, 4, v_head_dim=16, rope_type="yarn", rotary_scaling_factor=2.0, **EXPERTS),
    "grouped": grouped(2, num_attention_heads=8),
}
OTHER = {
    "attention": "gqa",
    "dtype": "bfloat16",
    "rope_type": "rope",
    "tie_embeddings": False,
    "moe_layer_pattern": (1, 1),
    "moe_router_score_function": "softmax",
    "moe_router_dtype": "fp32",
    "softmax_scale": 0.5,
    "core_form": "absorbed",
    "tokenizer_type": "x",
    "tokenizer_model": "x",
    "kv_lora_rank": 128,
    "num_experts": 5,
    "num_latent_heads": 8,
    "num_branches": 2,
    "num_attention_heads": 16,
    "num_query_groups": 4,
    "q_lora_rank": 64,
    "num_layers": 4,
    "swiglu": False,
    "no_rope_pattern": (0, 1),
}


def arguments(model, **changes):
    return Namespace(**to_megatron_args(model) | {"padded_vocab_size": 384} | changes)


def changed(model, name):
    """Another value of a field, and what goes with it."""
    old = getattr(model, name)
    new = OTHER.get(name, (not old) if isinstance(old, bool) else 2 * (old or 2))
    changes = {name: new}
    if name == "num_layers" and model.num_experts:
        changes["moe_layer_pattern"] = (0, 1, 1, 1)
    return dataclasses.replace(model, softmax_scale=None, **changes)


FIELDS = [field.name for field in dataclasses.fields(ModelDescription)]
# Set by what the other models of this family have, or by no argument that a run saves.
ELSEWHERE = {
    "attention",
    "swiglu",
    "softmax_scale",
    "tpa_q_rank",
    "tpa_kv_rank",
    "padded_vocab_size",
}


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in ELSEWHERE])
def test_every_field_is_compared_unless_it_is_said_not_to_be(name):
    of_grouped = name in ("num_query_groups", "head_dim", "qk_layernorm")
    model = MODELS["grouped" if of_grouped else "latent"]
    if name == "moe_router_pre_softmax":
        model = dataclasses.replace(model, moe_router_score_function="softmax")
    if name == "no_rope_pattern":
        model = dataclasses.replace(model, rope_type="rope")
    one = arguments(dataclasses.replace(model, softmax_scale=None))
    more = {"qk_layernorm": True} if name == "qk_layernorm" else {}
    other = arguments(changed(model, name), **more)
    # YaRN's scale of the scores follows from its factor.
    one.softmax_scale = other.softmax_scale = None
    found = [each[0] for each in differing_arguments(one, other)]
    assert bool(found) == (name not in _NOT_COMPARED), found


def test_arguments_outside_the_description():
    one = arguments(MODELS["latent"])
    assert differing_arguments(one, arguments(MODELS["latent"])) == []
    other = arguments(MODELS["latent"], normalization="LayerNorm", padded_vocab_size=512)
    assert differing_arguments(one, other) == [
        ("padded_vocab_size", 384, 512),
        ("normalization", "RMSNorm", "LayerNorm"),
    ]
    other = arguments(MODELS["latent"], softmax_scale=0.7)
    one.softmax_scale = None
    default = MODELS["latent"].softmax_scale
    assert differing_arguments(one, other) == [("softmax_scale", default, 0.7)]
    # A conversion says outright what a run leaves to its default.
    one, other = arguments(MODELS["latent"]), arguments(MODELS["latent"], softmax_scale=None)
    assert one.softmax_scale is not None and differing_arguments(one, other) == []


def test_positions_may_be_relaxed():
    one = arguments(MODELS["latent"], softmax_scale=None)
    other = arguments(MODELS["latent"], softmax_scale=None, rotary_base=5e5, beta_fast=16.0)
    assert [each[0] for each in differing_arguments(one, other)] == ["rotary_base", "beta_fast"]
    assert differing_arguments(one, other, ROPE_ARGUMENTS) == []


def test_arguments_of_no_model():
    for odd in (
        {"num_layers": "two"},
        {"variance_scaling": "false"},
        {"hidden_size": None},
        {"num_attention_heads": []},
    ):
        with pytest.raises(CheckpointError):
            differing_arguments(arguments(MODELS["latent"], **odd), arguments(MODELS["latent"]))


def test_two_ways_to_write_one_pattern_of_layers():
    plain = dataclasses.replace(MODELS["grouped"], softmax_scale=None)
    one, other = arguments(plain, no_rope_freq=2), arguments(plain, no_rope_freq=[0, 1])
    assert differing_arguments(one, other) == []
    assert differing_arguments(one, arguments(plain)) == [("no_rope_freq", 2, None)]
    for freq, said in ((3, "3"), ([0], r"\[0\]"), ([0, 0, 0], r"\[0, 0, 0\]")):
        with pytest.raises(CheckpointError, match=f"no_rope_freq is {said}; use a divisor of 2"):
            differing_arguments(arguments(plain, no_rope_freq=freq), one)
