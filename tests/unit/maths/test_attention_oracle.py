"""maths.attention.mlra_attention against the oracle, in float64: output and every gradient."""

from dataclasses import replace

import pytest
import torch

from megatron_mlra.layers.config import MLRAConfig
from megatron_mlra.maths.attention import mlra_attention
from support.modules import MLRA2, VARIANTS
from support.oracle import OracleConfig, config_values, reference, relative_error

TOLERANCE = 1e-10
TOKENS, BATCH = 7, 2


def check(case: OracleConfig, absorbed: bool, tokens: int = TOKENS, batch: int = BATCH) -> None:
    expected = reference(case, tokens, batch)
    config = MLRAConfig(**config_values(case))
    weights = {name: p.clone().requires_grad_() for name, p in expected.parameters.items()}
    x = expected.x.clone().requires_grad_()
    output = mlra_attention(x, weights, config, absorbed=absorbed)
    (output * expected.upstream).sum().backward()
    errors = {
        "output": relative_error(output.detach(), expected.output),
        "x": relative_error(x.grad, expected.x_grad),
    } | {name: relative_error(w.grad, expected.grads[name]) for name, w in weights.items()}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "materialized"])
@pytest.mark.parametrize("scaling", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_every_gradient(variant, gate, scaling, absorbed):
    case = replace(VARIANTS[variant], gate=gate, scaling=scaling)
    check(case, absorbed)


@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "materialized"])
@pytest.mark.parametrize(
    "changes",
    [
        {"q_rank": None},
        {"q_rank": None, "scaling": False, "gate": True},
        {"head_norm": True},
        {"head_norm": True, "q_rank": None, "norm_eps": 0.3},
        {"value": 11},
        {"qk_nope": 7, "value": 7, "kv_rank": 28},
        {"kv_rank": 12, "qk_rope": 10},
        {"norm_eps": 0.3},
        {"rope_base": 100.0},
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_sizes(changes, absorbed):
    check(replace(MLRA2, **changes), absorbed)


@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "materialized"])
@pytest.mark.parametrize(("tokens", "batch"), [(13, 3), (2, 1)])
def test_lengths(tokens, batch, absorbed):
    check(MLRA2, absorbed, tokens, batch)


def test_oracle_notices_a_wrong_scale():
    """Each of the method's factors, got wrong, moves the result far beyond the tolerance."""
    expected = reference(MLRA2, TOKENS, BATCH)
    values = config_values(MLRA2)
    for wrong in (
        {"variance_scaling": False},
        {"softmax_scale": (MLRA2.latent_dim + MLRA2.qk_rope) ** -0.5},
        {"rotary_base": 9000.0},
        {"layernorm_epsilon": 1e-5},
    ):
        config = MLRAConfig(**(values | wrong))
        output = mlra_attention(expected.x, expected.parameters, config, absorbed=True)
        assert relative_error(output, expected.output) > 1e4 * TOLERANCE, wrong


def test_half_precision_keeps_its_dtype_and_stays_near():
    expected = reference(MLRA2, TOKENS, BATCH)
    weights = {name: p.bfloat16() for name, p in expected.parameters.items()}
    config = MLRAConfig(**config_values(MLRA2))
    for absorbed in (True, False):
        output = mlra_attention(expected.x.bfloat16(), weights, config, absorbed=absorbed)
        assert output.dtype == torch.bfloat16
        assert relative_error(output, expected.output) < 0.05
