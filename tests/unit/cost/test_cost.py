"""Costs against method tables and against counts made another way."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from megatron_mlra.cost.cache import kv_cache_bytes_per_token, kv_cache_elements
from megatron_mlra.cost.flops import train_flops_per_token
from megatron_mlra.cost.parameters import parameters
from megatron_mlra.cost.traffic import cp_communication, tp_communication
from megatron_mlra.description.megatron_args import from_megatron_args
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.maths.attention import mlra_attention
from support import CONFIGS

FORM = {True: "absorbed", False: "materialized"}


def shape_of(name: str, **overrides) -> ModelDescription:
    preset = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    base = yaml.safe_load((CONFIGS / preset.pop("base")).read_text())
    return from_megatron_args(base | preset, **overrides)


SIZES = {
    "num_layers": 3,
    "hidden_size": 40,
    "ffn_hidden_size": 56,
    "num_attention_heads": 8,
    "vocab_size": 96,
    "q_lora_rank": 28,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 14,
}


def latent_shape(L: int, N: int, **overrides) -> ModelDescription:
    """A small member of the latent family in which no two sizes coincide."""
    chosen = {"num_latent_heads": L, "num_branches": N, "core_form": "materialized"}
    return ModelDescription(**(SIZES | chosen | overrides))


def test_importing_it_loads_no_torch():
    code = (
        "import sys, megatron_mlra.cost.parameters as a;"
        "assert not {'torch', 'numpy', 'megatron.core'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# (preset, KV numbers per token in units of d_h = 128: all, per device at TP4)
KV_TABLE = [
    ("mla_2.9b", 4.5, 4.5),
    ("gla2_2.9b", 4.5, 2.5),
    ("gla4_2.9b", 4.5, 1.5),
    ("mlra2_2.9b", 4.5, 1.5),
    ("mlra4_2.9b", 4.5, 1.5),
]


@pytest.mark.parametrize(("preset", "whole", "at_tp4"), KV_TABLE)
def test_kv_cache_of_the_latent_family(preset, whole, at_tp4):
    shape = shape_of(preset)
    assert kv_cache_elements(shape) == whole * 128
    assert kv_cache_elements(shape, tp=4) == at_tp4 * 128
    assert kv_cache_elements(shape, tp=8) == at_tp4 * 128, "a latent is never split"
    assert kv_cache_bytes_per_token(shape, 4) == 24 * at_tp4 * 128 * 2


def test_kv_cache_without_rope():
    shape = shape_of("mlra4_2.9b").replace(qk_rope_head_dim=0, softmax_scale=None)
    assert shape.softmax_scale == pytest.approx(128**-0.5)
    assert kv_cache_bytes_per_token(shape, tp=4) == 24 * 256, "384 per layer with RoPE"
    weights = parameters(shape).total - parameters(shape_of("mlra4_2.9b")).total
    assert weights == -24 * (24 * 64 * 1024 + 64 * 3072)


def test_kv_cache_of_the_others():
    gqa8 = shape_of("gqa_2.9b", num_query_groups=8)
    assert [kv_cache_elements(gqa8, tp) / 128 for tp in (1, 4, 8, 16)] == [16, 4, 2, 2]
    assert kv_cache_elements(shape_of("gla2_2.9b"), tp=2) == 2.5 * 128
    assert kv_cache_elements(shape_of("gta_2.9b"), tp=3) == 2 * 128 + 64
    assert kv_cache_elements(shape_of("mfa_2.9b"), tp=8) == 512
    assert kv_cache_elements(shape_of("tpa_2.9b"), tp=8) == 2 * 2 * (3 + 128)


@pytest.mark.parametrize(
    ("preset", "ratios"),
    [("mlra4_2.9b", (1.185, 1.348, 1.624, 2.538)), ("mlra2_2.9b", (1.062, 1.116, 1.208, 1.512))],
)
def test_training_surcharge_over_mla(preset, ratios):
    mla, shape = shape_of("mla_2.9b"), shape_of(preset)
    for s, ratio in zip((2048, 4096, 8192, 32768), ratios, strict=True):
        surcharge = train_flops_per_token(shape, s).model / train_flops_per_token(mla, s).model
        assert surcharge == pytest.approx(ratio, abs=0.002)


def core_products(shape: ModelDescription, s: int, absorbed: bool) -> None:
    """Score and value products of all cores over a sequence, a query at a time: causal by loop."""
    d_r, d_l = shape.qk_rope_head_dim, shape.latent_dim
    score, value = shape.qk_nope_head_dim + d_r, shape.v_head_dim
    if absorbed:
        score, value = d_l + d_r, d_l
    for _ in range(shape.num_layers * shape.num_attention_heads * shape.num_branches):
        for keys in range(1, s + 1):
            p = torch.empty(1, score) @ torch.empty(score, keys)
            p @ torch.empty(keys, value)


def linear_products(shape: ModelDescription, s: int, absorbed: bool) -> None:
    """Every weight product of one forward, from the method's steps."""
    d, f, h = shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads
    d_q, d_c, d_l = shape.q_lora_rank, shape.kv_lora_rank, shape.latent_dim
    d_h, d_r, d_v = shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim
    heads_served = h * shape.num_branches // shape.num_latent_heads

    def product(rows: int, inner: int, columns: int) -> None:
        torch.empty(rows, inner) @ torch.empty(inner, columns)

    for _ in range(shape.num_layers):
        product(s, d, d_q)
        product(s, d_q, h * (d_h + d_r))
        product(s, d, d_c + d_r)
        for _ in range(shape.num_latent_heads):
            if absorbed:
                for _ in range(heads_served):
                    product(s, d_h, d_l)
                    product(s, d_l, d_v)
            else:
                product(s, d_l, heads_served * (d_h + d_v))
        if shape.output_gate:
            product(s, d, h * d_v)
        product(s, h * d_v, d)
        product(s, d, 2 * f)
        product(s, f, d)
    product(s, d, shape.embedding_rows)


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize(
    ("L", "N", "gate"), [(1, 1, False), (2, 1, True), (4, 2, False), (4, 4, True)]
)
def test_training_flops_against_torchs_counter(L, N, gate, absorbed):
    shape, s = latent_shape(L, N, output_gate=gate, core_form=FORM[absorbed]), 5
    flops = train_flops_per_token(shape, s)
    linear = counted(lambda: linear_products(shape, s, absorbed))
    method = counted(lambda: core_products(shape, s, False))
    core = counted(lambda: core_products(shape, s, absorbed))
    assert flops.model * s == pytest.approx(3 * (linear + method), rel=1e-12)
    assert flops.hardware * s == pytest.approx(3 * (linear + core), rel=1e-12)
    with_core = train_flops_per_token(shape, s, recompute="core")
    assert with_core.model == flops.model
    assert (with_core.hardware - flops.hardware) * s == pytest.approx(core, rel=1e-12)
    with_all = train_flops_per_token(shape, s, recompute="full")
    output = 2 * s * shape.hidden_size * shape.embedding_rows
    extra = linear + core - output
    assert (with_all.hardware - flops.hardware) * s == pytest.approx(extra, rel=1e-12)


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize(("L", "N"), [(1, 1), (2, 1), (4, 2), (4, 4)])
def test_hardware_flops_against_the_attention_itself(L, N, absorbed):
    shape = latent_shape(L, N, num_layers=1, output_gate=True, core_form=FORM[absorbed])
    d, h, s, p = shape.hidden_size, shape.num_attention_heads, 6, parameters(shape)
    d_h, d_v, d_l = shape.qk_nope_head_dim, shape.v_head_dim, shape.latent_dim
    q_out = h * (d_h + shape.qk_rope_head_dim)
    config = SimpleNamespace(
        **SIZES,
        num_latent_heads=L,
        num_branches=N,
        output_gate=True,
        query_head_norm=True,
        latent_dim=d_l,
        num_head_groups=L // N,
        q_scale=1.0,
        kv_scale=1.0,
        branch_scale=1.0,
        softmax_scale=1.0,
        rotary_base=10000,
        layernorm_epsilon=1e-6,
    )

    def run() -> None:
        weights = {
            "linear_q_down_proj": torch.empty(shape.q_lora_rank, d),
            "q_norm": torch.empty(shape.q_lora_rank),
            "linear_q_up_proj": torch.empty(q_out, shape.q_lora_rank),
            "query_head_norm": torch.empty(q_out),
            "linear_kv_down_proj": torch.empty(shape.kv_lora_rank + shape.qk_rope_head_dim, d),
            "kv_norm": torch.empty(shape.kv_lora_rank),
            "linear_kv_up_proj": torch.empty(N, h, d_h + d_v, d_l),
            "linear_gate_proj": torch.empty(h * d_v, d),
            "linear_proj": torch.empty(d, h * d_v),
        }
        mlra_attention(torch.empty(s, 1, d), weights, config, absorbed=absorbed)

    # It computes all s scores of a query: as many as the mean of a causal sequence of 2 s - 1.
    forward = train_flops_per_token(shape, 2 * s - 1).hardware / 3
    assert counted(run) == s * (forward - 2 * p.mlp - 2 * p.embedding)


def test_recompute_of_the_up_projection():
    shape, s = latent_shape(4, 4), 16
    plain = train_flops_per_token(shape, s).hardware
    extra = train_flops_per_token(shape, s, "up_proj").hardware - plain
    # 3 layers, W_UQ [28, 8 * 14], and 4 * 8 (branch, head) pairs of d_l = 6, d_h + d_v = 24.
    assert extra == pytest.approx(3 * 2 * (28 * 8 * 14 + 32 * 6 * 24))
    absorbed = latent_shape(4, 4, core_form="absorbed")
    plain = train_flops_per_token(absorbed, s).hardware
    extra = train_flops_per_token(absorbed, s, "up_proj").hardware - plain
    assert extra == pytest.approx(3 * 2 * (28 * 8 * 14 + 32 * 6 * 10))


def test_absorbing_is_free_for_mlra4_and_not_for_mla():
    for name, free in (("mlra4_2.9b", True), ("mla_2.9b", False)):
        flops = train_flops_per_token(shape_of(name, core_form="absorbed"), 4096)
        assert (flops.hardware == flops.model) is free


def test_mixture_of_experts():
    shape = from_megatron_args(
        {
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 96,
            "num_attention_heads": 4,
            "vocab_size": 100,
            "swiglu": True,
            "attention": "gqa",
            "group_query_attention": True,
            "num_query_groups": 2,
            "num_experts": 8,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 24,
            "moe_shared_expert_intermediate_size": 16,
            "moe_layer_freq": [0, 1, 1, 1],
        }
    )
    p = parameters(shape)
    attention, norms = 32 * 8 * (4 + 4) + 32 * 32, 64
    expert, shared = 3 * 32 * 24, 3 * 32 * 16 + 32 * 8
    rest = 128 * 32 + 32 + 4 * (attention + norms) + 3 * 32 * 96
    assert shape.embedding_rows == 128, "100 padded to a multiple of 128"
    assert p.total == rest + 3 * (8 * expert + shared)
    assert p.active == rest + 3 * (2 * expert + shared)
    used = 2 * (p.active - 32 - 4 * norms) + 4 * 2 * 4 * 16 * (7 + 1) / 2
    assert train_flops_per_token(shape, 7).model == 3 * used


def test_communication_of_both_layouts():
    shape = shape_of("mlra4_2.9b")  # d 3072, h 24, d_q 1024, d_c 512, d_r 64, d_h = d_v = 128
    head = tp_communication(shape, 4, "head", sequence_parallel=True)
    assert [(c.kind, c.numbers) for c in head.forward] == [
        ("all_gather", 3072),
        ("all_gather", 1024 + 512 + 64),
        ("reduce_scatter", 3072),
    ]
    assert [c.kind for c in head.backward] == [
        "all_gather",
        "reduce_scatter",
        "reduce_scatter",
    ]
    assert sent(head.forward) == sent(head.backward) == 2 * 3072 + 1600
    assert head.wire_numbers == 0.75 * 2 * (2 * 3072 + 1600)

    plain = tp_communication(shape, 2, "head")
    assert [(c.kind, c.numbers) for c in plain.backward] == [
        ("reduce_scatter", 1600),
        ("all_reduce", 3072),
    ]
    latent = tp_communication(shape, 4, "latent")
    assert [(c.what, c.kind, c.numbers) for c in latent.forward] == [
        ("latents", "all_gather", 1024 + 64),
        ("queries", "all_gather", 24 * 192),
        ("branch outputs", "reduce_scatter", 24 * 128),
        ("exit", "all_reduce", 3072),
    ]
    beyond = tp_communication(shape, 8, "latent")
    assert [(c.what, c.kind, c.numbers) for c in beyond.forward] == [
        ("latents", "all_gather", 1024 + 512 + 64),
        ("queries", "all_to_all", 4 * 24 / 8 * 192),
        ("branch outputs", "all_to_all", 4 * 24 / 8 * 128),
        ("exit", "all_reduce", 3072),
    ]
    assert tp_communication(shape, 1).wire_numbers == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention": "mqa"}, "attention is 'mqa'; use one of mlra"),
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({"num_branches": 3}, "num_branches 3 does not divide num_latent_heads 4"),
    ],
)
def test_bad_shapes_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        shape_of("mlra4_2.9b", **overrides)


def test_bad_questions_are_refused():
    shape = shape_of("gqa_2.9b")
    with pytest.raises(ValueError, match="has no latents; use 'core'"):
        train_flops_per_token(shape, 8, "up_proj")
    with pytest.raises(ValueError, match="recompute is 'all'"):
        train_flops_per_token(shape, 8, "all")
    with pytest.raises(ValueError, match="layout is 'tp'"):
        tp_communication(shape, 2, "tp")


def sent(collectives) -> float:
    """Numbers per token and layer."""
    return sum(collective.numbers for collective in collectives)


def test_context_parallel_gathers_latents():
    shape = shape_of("mlra4_2.9b")
    whole = cp_communication(shape, 4)
    assert (sent(whole.forward), sent(whole.backward)) == (576, 576)
    assert whole.wire_numbers == 2 * 576 * 3 / 4
    assert sent(cp_communication(shape, 4, tp=4, layout="head").forward) == 576
    assert sent(cp_communication(shape, 4, tp=4, layout="latent").forward) == 128 + 64
    assert sent(cp_communication(shape_of("mlra2_2.9b"), 2, tp=2).forward) == 2 * 128 + 64
    assert cp_communication(shape, 1).wire_numbers == 0
    with pytest.raises(ValueError, match="attention is 'gta'; use mlra"):
        cp_communication(shape_of("gta_2.9b"), 2)
    with pytest.raises(ValueError, match="layout is 'cp'; use head or latent"):
        cp_communication(shape, 2, layout="cp")
