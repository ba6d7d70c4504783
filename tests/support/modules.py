"""Builds and runs the attention modules of the tiny variants, for comparison with the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.spec_utils import build_module

from megatron_mlra.layers.attention import MLRASelfAttention
from megatron_mlra.layers.config import MLRAConfig
from megatron_mlra.layers.specs import mlra_attention_spec
from support.oracle import OracleConfig, config_values, parameter_shapes, relative_error

TOLERANCE = 1e-5


TOKENS = 9


BATCH = 2


FORMS = ("absorbed", "materialized")


SIZES = {"hidden": 22, "qk_nope": 6, "qk_rope": 4, "value": 5, "q_rank": 9}


VARIANTS = {
    "MLA": OracleConfig(heads=3, kv_rank=14, latents=1, branches=1, **SIZES),
    "GLA-2": OracleConfig(heads=6, kv_rank=14, latents=2, branches=1, **SIZES),
    "GLA-4": OracleConfig(heads=8, kv_rank=28, latents=4, branches=1, **SIZES),
    "MLRA-2": OracleConfig(heads=6, kv_rank=28, latents=4, branches=2, **SIZES),
    "MLRA-4": OracleConfig(heads=3, kv_rank=28, latents=4, branches=4, **SIZES),
    "MLRA-8": OracleConfig(heads=3, kv_rank=24, latents=8, branches=8, **SIZES),
}


MLRA2 = VARIANTS["MLRA-2"]


@contextmanager
def world_of_one() -> Iterator[ProcessGroupCollection]:
    """Process groups of a world of one rank, with the CPU in place of Megatron's CUDA device and
    random state."""
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch.setattr(megatron_random, "_get_cuda_rng_state", lambda **_: torch.get_rng_state())
        patch.setattr(
            megatron_random, "_set_cuda_rng_state", lambda state, **_: torch.set_rng_state(state)
        )
        yield ProcessGroupCollection(tp=dist.group.WORLD, cp=dist.group.WORLD)
    if started:
        dist.destroy_process_group()


def build(
    case: OracleConfig, groups, parameters, layer_number: int = 1, **overrides
) -> MLRASelfAttention:
    """The module with these parameters, in float32."""
    config = MLRAConfig(**(config_values(case) | overrides))
    attention = build_module(
        mlra_attention_spec(config), config=config, layer_number=layer_number, pg_collection=groups
    )
    module_parameters = named(attention)
    assert {name: tuple(p.shape) for name, p in module_parameters.items()} == parameter_shapes(case)
    with torch.no_grad():
        for name, p in module_parameters.items():
            assert p.dtype == torch.float32
            p.copy_(parameters[name])
    return attention


def named(attention: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name.removesuffix(".weight"): p for name, p in attention.named_parameters()}


def run(attention: MLRASelfAttention, x, upstream, mask=None) -> dict[str, torch.Tensor]:
    """Name -> output, gradient of the input, and gradient of every parameter."""
    x = x.float().requires_grad_()
    output, bias = attention(x, mask)
    assert bias is None
    assert output.dtype == torch.float32
    (output * upstream.float()).sum().backward()
    grads = {name: p.grad for name, p in named(attention).items()}
    return {"output": output.detach(), "x": x.grad} | grads


def assert_near(actual: dict[str, torch.Tensor], expected) -> None:
    wanted = {"output": expected.output, "x": expected.x_grad} | expected.grads
    assert actual.keys() == wanted.keys()
    errors = {name: relative_error(actual[name], wanted[name]) for name in wanted}
    assert max(errors.values()) <= TOLERANCE, errors
