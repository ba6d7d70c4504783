"""MLRASelfAttention, one rank in float32, against the oracle: output and every gradient."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_mlra.layers.attention import MLRASelfAttention
from megatron_mlra.layers.config import MLRAConfig
from megatron_mlra.layers.recompute import rebuilt_in_backward
from megatron_mlra.layers.specs import mlra_attention_spec
from support.modules import (
    BATCH,
    FORMS,
    MLRA2,
    TOKENS,
    VARIANTS,
    assert_near,
    build,
    named,
    run,
)
from support.oracle import (
    OracleConfig,
    Yarn,
    config_values,
    document_mask,
    reference,
    relative_error,
)


def check(
    case: OracleConfig,
    groups,
    tokens: int = TOKENS,
    batch: int = BATCH,
    **overrides,
) -> None:
    expected = reference(case, tokens, batch)
    attention = build(case, groups, expected.parameters, **overrides)
    actual = run(attention, expected.x, expected.upstream)
    assert_near(actual, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("gate", "scaling"),
    [(False, True), (True, True), (False, False)],
    ids=["plain", "gated", "unscaled"],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_every_gradient(variant, gate, scaling, form, groups):
    check(replace(VARIANTS[variant], gate=gate, scaling=scaling), groups, core_form=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "changes",
    [
        {"q_rank": None},
        {"q_rank": None, "gate": True, "scaling": False},
        {"value": 9},
        {"value": 11},
        {"kv_rank": 12, "qk_rope": 8},
        {"head_norm": True},
        {"head_norm": True, "q_rank": None, "norm_eps": 0.3},
        {"head_norm": True, "qk_rope": 0, "scaling": False},
        {"qk_rope": 0},
        {"qk_rope": 0, "q_rank": None, "kv_rank": 12},
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_sizes(changes, form, groups):
    check(replace(MLRA2, **changes), groups, core_form=form)


@pytest.mark.parametrize("form", FORMS)
def test_long_odd_sequence(form, groups):
    check(MLRA2, groups, tokens=17, batch=1, core_form=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("modules", [["core_attn"], ["mla_up_proj"], ["core_attn", "mla_up_proj"]])
def test_recomputation_changes_no_gradient(modules, form, groups):
    case = replace(MLRA2, gate=True, head_norm=True)
    expected = reference(case, TOKENS, BATCH)
    plain = build(case, groups, expected.parameters, core_form=form)
    recomputing = build(
        case,
        groups,
        expected.parameters,
        core_form=form,
        recompute_granularity="selective",
        recompute_modules=modules,
    )
    calls = count_calls(recomputing)
    wanted = run(plain, expected.x, expected.upstream)
    actual = run(recomputing, expected.x, expected.upstream)
    assert calls == {
        "_run_core_attention": 1 + ("core_attn" in modules),
        "_assemble": 1 + ("mla_up_proj" in modules),
    }
    for name, tensor in wanted.items():
        assert torch.equal(actual[name], tensor), name
    assert_near(actual, expected)


@pytest.mark.parametrize("modules", [None, ["core_attn"]])
def test_rebuilding_the_absorbed_query_changes_no_gradient(modules, groups):
    case = replace(MLRA2, head_norm=True)
    expected = reference(case, TOKENS, BATCH)
    recompute = {"recompute_granularity": "selective", "recompute_modules": modules}
    options = {"core_form": "absorbed", **(recompute if modules else {})}
    results, calls = [], []
    for rebuilds in (False, True):
        attention = build(
            case, groups, expected.parameters, recompute_absorbed_query=rebuilds, **options
        )
        counted = Mock(wraps=attention.latent_functions)
        attention.latent_functions = counted
        results.append(run(attention, expected.x, expected.upstream))
        calls.append(counted.rotate_absorb.call_count)
    assert calls == [1, 2]
    for name, tensor in results[0].items():
        assert torch.equal(results[1][name], tensor), name


def test_a_rebuilt_tensor_is_not_kept():
    source = torch.randn(5, 4, requires_grad=True)
    query = source * 2
    kept = StorageWeakRef(query.untyped_storage())
    with rebuilt_in_backward(query, lambda: source.detach() * 2):
        out = query.T.square().sum()
    expected = 8 * source.detach()
    del query
    assert kept.expired()
    out.backward()
    torch.testing.assert_close(source.grad, expected)


def count_calls(attention: MLRASelfAttention) -> dict[str, int]:
    """How often the two parts that can be recomputed run, counted from now on."""
    calls = {"_run_core_attention": 0, "_assemble": 0}

    def counted(name, method):
        def call(*args, **kwargs):
            calls[name] += 1
            return method(*args, **kwargs)

        return call

    for name in calls:
        setattr(attention, name, counted(name, getattr(attention, name)))
    return calls


@pytest.mark.parametrize("form", FORMS)
def test_document_mask(form, groups):
    documents = (4, 2, 3)
    expected = reference(MLRA2, TOKENS, BATCH, documents)
    attention = build(MLRA2, groups, expected.parameters, core_form=form)
    hidden = ~document_mask(TOKENS, documents)  # True where not attended to
    actual = run(attention, expected.x, expected.upstream, hidden.expand(BATCH, 1, -1, -1))
    assert_near(actual, expected)
    causal = reference(MLRA2, TOKENS, BATCH)
    assert relative_error(actual["output"], causal.output) > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_a_pattern_of_layers_without_rope(form, groups):
    """Such a layer keeps its RoPE dims, which no position turns; the others are as without it."""
    for layer, still in ((1, False), (2, True)):
        expected = reference(MLRA2, TOKENS, BATCH, still=still)
        pattern = {"layer_number": layer, "no_rope_freq": 2, "core_form": form}
        attention = build(MLRA2, groups, expected.parameters, **pattern)
        assert_near(run(attention, expected.x, expected.upstream), expected)
    rotated = reference(MLRA2, TOKENS, BATCH)
    assert relative_error(expected.output, rotated.output) > 0.01


YARN = {
    "rope_type": "yarn",
    "original_max_position_embeddings": 16,
    "rotary_scaling_factor": 8.0,
    "beta_fast": 1.0,
    "beta_slow": 0.1,
    "mscale": 1.0,
}


@pytest.mark.parametrize("mscale_all_dim", [0.0, 1.0, 0.707])
@pytest.mark.parametrize("form", FORMS)
def test_yarn_in_both_forms(mscale_all_dim, form, groups):
    yarn = Yarn(factor=8.0, original=16, fast=1.0, slow=0.1, mscale=1.0, all_dim=mscale_all_dim)
    numbers = YARN | {"mscale_all_dim": mscale_all_dim}
    for config in (MLRA2, replace(MLRA2, branches=MLRA2.latents)):
        check(replace(config, yarn=yarn), groups, core_form=form, **numbers)
    plain, stretched = (reference(replace(MLRA2, yarn=y), TOKENS, BATCH) for y in (None, yarn))
    assert relative_error(stretched.output, plain.output) > 0.01


def test_yarn_of_factor_one_is_plain_rope(groups):
    check(MLRA2, groups, **(YARN | {"rotary_scaling_factor": 1.0}))


def test_output_projection_starts_at_zero_and_all_else_does_not(groups):
    def fresh(**overrides) -> dict[str, torch.nn.Parameter]:
        case = replace(MLRA2, gate=True, head_norm=True)
        config = MLRAConfig(**(config_values(case) | overrides))
        spec = mlra_attention_spec(config)
        return named(build_module(spec, config=config, layer_number=1, pg_collection=groups))

    torch.manual_seed(3)
    for name, p in fresh().items():
        if name == "linear_proj":
            assert not p.any()
        elif name.endswith("norm"):
            assert torch.equal(p, torch.ones_like(p))
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.25), name
    off = fresh(zero_init_output=False)["linear_proj"]
    assert off.std().item() == pytest.approx(0.02, rel=0.25)
