"""Partial RoPE sees only distances: shifting every position leaves the outputs as they were."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module

from megatron_mlra.layers.config import MLRAConfig
from megatron_mlra.layers.specs import mlra_attention_spec
from megatron_mlra.maths.attention import mlra_attention
from support.modules import FORMS
from support.oracle import OracleConfig, config_values, mlra_oracle, oracle_weights, reference
from support.oracle import relative_error as error

TOKENS, BATCH = 11, 2
SHIFTS = (1, 137, 10000)
SIZES = {"hidden": 22, "qk_nope": 6, "qk_rope": 8, "value": 5, "q_rank": 9, "kv_rank": 28}
CASES = {
    "MLA": OracleConfig(heads=3, latents=1, branches=1, **SIZES),
    "MLRA-2": OracleConfig(heads=6, latents=4, branches=2, **SIZES),
}

# Positions that are no shift of 0 .. s - 1, so the outputs must not stay the same.
UNEVEN = {
    "later half": list(range(5)) + [i + 137 for i in range(5, TOKENS)],
    "stretched": [2 * i for i in range(TOKENS)],
    "one token": [0, 1, 2, 3, 40, 5, 6, 7, 8, 9, 10],
}


def functional(case: OracleConfig, form: str, positions: torch.Tensor) -> torch.Tensor:
    drawn = reference(case, TOKENS, BATCH)
    return mlra_attention(
        drawn.x,
        drawn.parameters,
        MLRAConfig(**config_values(case)),
        absorbed=form == "absorbed",
        positions=positions,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", CASES)
def test_shifting_all_positions(name, shift, form):
    at_zero = functional(CASES[name], form, torch.arange(TOKENS))
    shifted = functional(CASES[name], form, torch.arange(TOKENS) + shift)
    assert error(shifted, at_zero) <= 1e-9


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", UNEVEN)
def test_shifting_some_positions_changes_the_output(which, form):
    case = CASES["MLRA-2"]
    at_zero = functional(case, form, torch.arange(TOKENS))
    uneven = functional(case, form, torch.tensor(UNEVEN[which]))
    assert error(uneven, at_zero) > 1e-2
    assert error(uneven, oracle_output(case, UNEVEN[which], UNEVEN[which])) <= 1e-10


def test_shifting_the_keys_alone_changes_the_output():
    case = CASES["MLRA-2"]
    here = list(range(TOKENS))
    there = [i + 137 for i in here]
    at_zero = oracle_output(case, here, here)
    assert error(oracle_output(case, here, there), at_zero) > 1e-2
    assert error(oracle_output(case, there, here), at_zero) > 1e-2
    assert error(oracle_output(case, there, there), at_zero) <= 1e-9


def oracle_output(case: OracleConfig, queries: list[int], keys: list[int]) -> torch.Tensor:
    drawn = reference(case, TOKENS, BATCH)
    weights = oracle_weights(drawn.parameters, case)
    outputs = [
        mlra_oracle(drawn.x[:, n], weights, case, query_positions=queries, key_positions=keys)
        for n in range(BATCH)
    ]
    return torch.stack(outputs, dim=1)


@pytest.fixture(scope="module")
def groups():
    """The process groups of a world of one; Megatron's CUDA device is the CPU."""
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        yield ProcessGroupCollection(tp=dist.group.WORLD, cp=dist.group.WORLD)
    if started:
        dist.destroy_process_group()


def module(case: OracleConfig, groups, **overrides) -> torch.nn.Module:
    """MLRASelfAttention in float32 with the drawn parameters."""
    config = MLRAConfig(**(config_values(case) | overrides))
    spec = mlra_attention_spec(config)
    attention = build_module(spec, config=config, layer_number=1, pg_collection=groups)
    drawn = reference(case, TOKENS, BATCH)
    with torch.no_grad():
        for name, p in attention.named_parameters():
            p.copy_(drawn.parameters[name.removesuffix(".weight")])
    return attention


YARN = {"rope_type": "yarn", "rotary_scaling_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("rope", [{}, YARN], ids=["rope", "yarn"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_shifting_all_positions_of_the_module(shift, form, rope, groups):
    case = CASES["MLRA-2"]
    attention = module(case, groups, core_form=form, **rope)
    x = reference(case, TOKENS, BATCH).x.float()
    with torch.no_grad():
        at_zero, _ = attention(x, None)
        shifted, _ = attention(x, None, sequence_len_offset=shift)
    assert not torch.equal(shifted, at_zero)
    assert error(shifted, at_zero.double()) <= 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_shifting_some_positions_of_the_module_changes_the_output(form, groups, monkeypatch):
    case = CASES["MLRA-2"]
    attention = module(case, groups, core_form=form)
    x = reference(case, TOKENS, BATCH).x.float()
    angles = attention._rotary_angles

    def uneven(s: int, offset: int) -> tuple[torch.Tensor, ...]:
        pairs = zip(angles(s, offset), angles(s, offset + 137), strict=True)
        return tuple(torch.cat((here[:5], there[5:])) for here, there in pairs)

    with torch.no_grad():
        at_zero, _ = attention(x, None)
        monkeypatch.setattr(attention, "_rotary_angles", uneven)
        changed, _ = attention(x, None)
    assert error(changed, at_zero.double()) > 1e-2
    positions = UNEVEN["later half"]
    assert error(changed, oracle_output(case, positions, positions)) <= 1e-4
