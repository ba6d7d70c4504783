"""The planner's memory against what small real models hold, in real processes."""

import json

import pytest

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.planner.layout import Layout
from megatron_mlra.planner.memory import (
    layer_activations,
    optimizer_bytes,
    output_activations,
    rank_parameters,
)
from megatron_mlra.planner.step import traffic

CASES = {
    "mlra4": {},
    "mlra4_query_kept": {"keep_absorbed_query": True},
    "mlra4_fp32": {},
    "mlra4_materialized": {},
    "mlra4_gated": {},
    "mlra4_core": {"recompute": "core"},
    "mlra4_up_proj": {"recompute": "up_proj"},
    "mlra4_both": {"recompute": "core+up_proj"},
    "mlra4_full": {"recompute": "full"},
    "mla": {},
    "gqa": {},
    "mlra4_tp2": {"tp": 2},
    "mlra4_tp2_latent": {"tp": 2, "tp_layout": "latent"},
    "mlra4_cp2": {"cp": 2},
    "mlra4_materialized_cp2": {"cp": 2},
    "mlra4_full_cp2": {"cp": 2, "recompute": "full"},
    "mlra4_tp2_cp2": {"tp": 2, "cp": 2},
    "mlra4_dp2": {"dp": 2},
}


@pytest.fixture(scope="module")
def measured(run_driver):
    """Case -> bytes on rank 0."""
    folder = run_driver("memory", 900)
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*-0.json")}
    assert {name.removesuffix("-0") for name in found} == set(CASES)
    return found


MATERIALIZED = ("mla", "mlra4_materialized", "mlra4_materialized_cp2")


def planned(name: str) -> tuple[ModelDescription, Layout]:
    sizes = {
        "num_layers": 3,
        "hidden_size": 256,
        "ffn_hidden_size": 704,
        "num_attention_heads": 8,
        "vocab_size": 512,
        "seq_length": 128,
        "output_gate": name == "mlra4_gated",
        "query_head_norm": name == "mlra4_gated",
    }
    if name == "gqa":
        sizes |= {"attention": "gqa", "head_dim": 32, "num_query_groups": 2}
    else:
        latents = 1 if name == "mla" else 4
        sizes |= {
            "num_latent_heads": latents,
            "num_branches": latents,
            "q_lora_rank": 96,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "core_form": "materialized" if name in MATERIALIZED else "absorbed",
        }
    options = {"micro_batch": 2, "distributed_optimizer": name == "mlra4_dp2"} | CASES[name]
    return ModelDescription(**sizes), Layout(**options)


@pytest.mark.parametrize("name", CASES)
def test_activations_are_within_a_tenth(name, measured):
    shape, layout = planned(name)
    e = 4 if name == "mlra4_fp32" else 2
    layers = sum(
        layer_activations(shape, layout, "local", e, shape.is_moe(layer))
        for layer in range(shape.num_layers)
    )
    if layout.recompute == "full":
        layers += e * shape.hidden_size * layout.sequence_share  # the last layer's output
    tokens = layout.micro_batch * shape.seq_length / layout.cp
    said = tokens * (layers + output_activations(shape, layout, "local", e))
    assert said == pytest.approx(measured[f"{name}-0"]["activations"], rel=0.1)


@pytest.mark.parametrize("name", [name for name in CASES if "cp2" in name])
def test_context_parallel_sends_what_was_said(name, measured):
    shape, layout = planned(name)
    assert traffic(shape, layout, 1).context == measured[f"{name}-0"]["context"] > 0


@pytest.mark.parametrize("name", CASES)
def test_weights_gradients_and_optimizer(name, measured):
    shape, layout = planned(name)
    half, found = name != "mlra4_fp32", measured[f"{name}-0"]
    dense, experts = rank_parameters(shape, layout)
    assert dense * (2 if half else 4) == found["weights"]
    assert dense * 4 == pytest.approx(found["gradients"], rel=0.01)
    assert optimizer_bytes(dense, experts, layout, half) == pytest.approx(
        found["optimizer"], rel=0.1
    )
