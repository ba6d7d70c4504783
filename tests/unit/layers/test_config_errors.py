"""What cannot work is a ValueError of one line, with the value that is wrong and one that works."""

import re

import pytest

from megatron_mlra.layers.config import MLRAConfig

# h 4 heads, L 4 latent heads, N 2 branches: G 2 head groups.
BASE = {
    "num_layers": 2,
    "hidden_size": 24,
    "ffn_hidden_size": 32,
    "num_attention_heads": 4,
    "num_latent_heads": 4,
    "num_branches": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 28,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 5,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "use_cpu_initialization": True,
    "transformer_impl": "local",
}
TP = "tensor_model_parallel_size"
TWELVE = {"num_attention_heads": 12, "kv_lora_rank": 60}
TWELVE |= {"num_latent_heads": 12, "qk_pos_emb_head_dim": 12}
# Every GEMM dim a multiple of 16, at TP2 too.
FP8 = {
    "fp8": "hybrid",
    "hidden_size": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 48,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 16,
    "v_head_dim": 16,
}
OFFLOAD = {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn"]}
WHOLE = r"must be a whole number of at least 1$"

# Each row: what is set, the words that name what is wrong, and the fixes offered. A fix is a
# pattern that finds it in the message and the field it is for: what the pattern captures is tried,
# each of a comma-separated list. A pattern without a capture comes with the settings to try.
ROWS = [
    # Sizes.
    ({"num_latent_heads": 0}, "num_latent_heads is 0", [(WHOLE, {"num_latent_heads": 2})]),
    ({"num_latent_heads": -4}, "num_latent_heads is -4", [(WHOLE, {"num_latent_heads": 4})]),
    ({"num_latent_heads": "4"}, "num_latent_heads is '4'", [(WHOLE, {"num_latent_heads": 4})]),
    ({"num_branches": 0}, "num_branches is 0", [(WHOLE, {"num_branches": 1})]),
    ({"num_branches": 2.0}, "num_branches is 2.0", [(WHOLE, {"num_branches": 2})]),
    ({"num_attention_heads": 0}, "num_attention_heads is 0", [(WHOLE, {"num_attention_heads": 2})]),
    ({"hidden_size": None}, "hidden_size is None", [(WHOLE, {"hidden_size": 1})]),
    ({"kv_lora_rank": -28}, "kv_lora_rank is -28", [(WHOLE, {"kv_lora_rank": 4})]),
    ({"kv_lora_rank": 28.0}, "kv_lora_rank is 28.0", [(WHOLE, {"kv_lora_rank": 28})]),
    ({"qk_head_dim": 0}, "qk_head_dim is 0", [(WHOLE, {"qk_head_dim": 1})]),
    (
        {"qk_pos_emb_head_dim": -2},
        "qk_rope_head_dim is -2",
        [("0 for no RoPE", {"qk_pos_emb_head_dim": 0})],
    ),
    (
        {"qk_pos_emb_head_dim": 0, "rope_type": "yarn"},
        "rope_type yarn stretches RoPE, and qk_rope_head_dim is 0 (NoPE)",
        [(r"use rope_type (\w+)", "rope_type")],
    ),
    (
        {"qk_pos_emb_head_dim": 0, "latent_kernels": "mlra_kernels"},
        "latent_kernels mlra_kernels rotate at least 16 dims, and qk_rope_head_dim is 0 (NoPE)",
        [(r"use latent_kernels (\w+) or (\w+)", "latent_kernels")],
    ),
    ({"v_head_dim": 2.5}, "v_head_dim is 2.5", [(WHOLE, {"v_head_dim": 1})]),
    ({"q_lora_rank": 0}, "q_lora_rank is 0", [(r"at least (\d+)", "q_lora_rank")]),
    ({"q_lora_rank": -3}, "q_lora_rank is -3", [("leave it out", {"q_lora_rank": None})]),
    ({"q_lora_rank": 12.5}, "q_lora_rank is 12.5", [(r"at least (\d+)", "q_lora_rank")]),
    ({"q_lora_rank": "12"}, "q_lora_rank is '12'", [(r"at least (\d+)", "q_lora_rank")]),
    (
        {"qk_pos_emb_head_dim": 3},
        "qk_rope_head_dim 3 is odd",
        [(r"use (\d+)", "qk_pos_emb_head_dim")],
    ),
    # The variant.
    (
        {"num_latent_heads": 3, "num_branches": 1, "num_attention_heads": 12},
        "num_latent_heads 3 does not divide kv_lora_rank 28",
        [(r"num_latent_heads (\d+) or", "num_latent_heads"), (r"rank (\d+)$", "kv_lora_rank")],
    ),
    (
        {"kv_lora_rank": 30},
        "num_latent_heads 4 does not divide kv_lora_rank 30",
        [(r"num_latent_heads (\d+) or", "num_latent_heads"), (r"rank (\d+)$", "kv_lora_rank")],
    ),
    *(
        (
            {"num_branches": count},
            f"num_branches {count} does not divide num_latent_heads 4",
            [(r"use num_branches (\d+)", "num_branches")],
        )
        for count in (3, 8)
    ),
    (
        {"num_attention_heads": 5},
        "num_attention_heads 5 does not divide into 2 head groups",
        [(r"use num_attention_heads (\d+)", "num_attention_heads")],
    ),
    # Choices.
    (
        {"latent_tp_layout": "heads"},
        "latent_tp_layout is 'heads'",
        [(r"use one of (.+)", "latent_tp_layout")],
    ),
    ({"core_form": "absorb"}, "core_form is 'absorb'", [(r"use one of (.+)", "core_form")]),
    ({"core_backend": "flash"}, "core_backend is 'flash'", [(r"use one of (.+)", "core_backend")]),
    ({"rope_type": "llama"}, "rope_type is 'llama'", [(r"use one of (.+)", "rope_type")]),
    ({"rope_type": None}, "rope_type is None", [(r"use one of (.+)", "rope_type")]),
    # Rotary embedding.
    ({"rotary_base": 0}, "rotary_base is 0", [(r"e\.g\. (\d+)", "rotary_base")]),
    ({"rotary_base": None}, "rotary_base is None", [(r"e\.g\. (\d+)", "rotary_base")]),
    (
        {"rope_type": "yarn", "rotary_scaling_factor": 0.5},
        "rotary_scaling_factor is 0.5",
        [(r"at least (\d+)", "rotary_scaling_factor")],
    ),
    (
        {"rope_type": "yarn", "rotary_scaling_factor": None},
        "rotary_scaling_factor is None",
        [(r"at least (\d+)", "rotary_scaling_factor")],
    ),
    ({"rotary_percent": 0.5}, "rotary_percent is 0.5", [(r"use (1\.0)", "rotary_percent")]),
    (
        {"apply_rope_fusion": True},
        "apply_rope_fusion (True)",
        [("use --no-rope-fusion", {"apply_rope_fusion": False})],
    ),
    # Tensor parallel: what every layout needs, then what each of them needs.
    (
        {TP: 3},
        "tensor parallel size 3 does not divide num_attention_heads 4",
        [(r"use tensor parallel size (\d+)", TP)],
    ),
    (
        {TP: 8, "q_lora_rank": 16, "kv_lora_rank": 32, "qk_pos_emb_head_dim": 8},
        "tensor parallel size 8 does not divide num_attention_heads 4",
        [(r"use tensor parallel size (\d+)", TP), (r"heads (\d+)$", "num_attention_heads")],
    ),
    (
        {TP: 4, "q_lora_rank": 10},
        "tensor parallel size 4 does not divide q_lora_rank 10",
        [(r"use tensor parallel size (\d+)", TP), (r"q_lora_rank (\d+)$", "q_lora_rank")],
    ),
    (
        {TP: 4, "num_latent_heads": 2, "num_branches": 1, "kv_lora_rank": 30},
        "tensor parallel size 4 does not divide kv_lora_rank 30",
        [(r"use tensor parallel size (\d+)", TP), (r"kv_lora_rank (\d+)$", "kv_lora_rank")],
    ),
    (
        {TP: 4, "qk_pos_emb_head_dim": 6},
        "tensor parallel size 4 does not divide qk_rope_head_dim 6",
        [
            (r"use tensor parallel size (\d+)", TP),
            (r"qk_rope_head_dim (\d+)$", "qk_pos_emb_head_dim"),
        ],
    ),
    ({TP: 0}, "0", [(r"at least (\d+)", TP)]),
    ({TP: -1}, "-1", [(r"at least (\d+)", TP)]),
    (
        {TP: 3, "num_attention_heads": 6, "kv_lora_rank": 36, "qk_pos_emb_head_dim": 6},
        "tensor parallel size 3 neither divides num_latent_heads 4 nor is a multiple",
        [(r"use .*?(\d+)", TP)],
    ),
    (
        TWELVE | {TP: 6, "num_branches": 3},
        "tensor parallel size 6 does not fit 4 head groups in the head layout",
        [(r"use .*?(\d+)", TP)],
    ),
    (
        TWELVE | {TP: 6, "num_branches": 4, "latent_tp_layout": "latent"},
        "tensor parallel size 6 does not fit 4 branches in the latent layout",
        [(r"use .*?(\d+)", TP), (r"latent_tp_layout (head)", "latent_tp_layout")],
    ),
    # What would be ignored, or fail later.
    (
        {"add_bias_linear": True},
        "add_bias_linear (True)",
        [("no biases", {"add_bias_linear": False})],
    ),
    (
        {"no_rope_freq": 3, "num_layers": 4},
        "no_rope_freq 3 does not divide num_layers 4",
        [(r"use no_rope_freq (\d)", "no_rope_freq")],
    ),
    (
        {"no_rope_freq": [1, 0, 2], "num_layers": 3},
        "no_rope_freq is [1, 0, 2]",
        [("use a 0 or 1 for each", {"no_rope_freq": [1, 0, 0]})],
    ),
    (
        {"no_rope_freq": 1, "qk_pos_emb_head_dim": 0},
        "qk_rope_head_dim 0 does not go with no_rope_freq",
        [("leave no_rope_freq out", {"no_rope_freq": None})],
    ),
    (
        {"no_rope_freq": 1, "mtp_num_layers": 1},
        "mtp_num_layers 1 does not go with no_rope_freq",
        [("leave it out", {"mtp_num_layers": None})],
    ),
    (
        {"no_rope_freq": 1, "rope_type": "yarn"},
        "rope_type yarn does not go with no_rope_freq",
        [(r"use rope_type (\w+)", "rope_type")],
    ),
    ({"softmax_scale": 0.0}, "softmax_scale is 0.0", [("leave it out", {"softmax_scale": None})]),
    (
        {"layernorm_epsilon": 0.0},
        "layernorm_epsilon is 0.0",
        [(r"e\.g\. 1e-6", {"layernorm_epsilon": 1e-6})],
    ),
    (
        {"attention_dropout": 1.5},
        "attention_dropout is 1.5",
        [("from 0 to below 1", {"attention_dropout": 0.5})],
    ),
    (
        {"rope_type": "yarn", "original_max_position_embeddings": 0},
        "original_max_position_embeddings is 0",
        [("at least 1", {"original_max_position_embeddings": 4096})],
    ),
    # Precision.
    (
        FP8 | {"ffn_hidden_size": 40},
        "ffn_hidden_size is 40, and FP8 at tensor parallel size 1",
        [(r"use (\d+)", "ffn_hidden_size")],
    ),
    (
        FP8 | {"ffn_hidden_size": 48, TP: 2},
        "ffn_hidden_size is 48, and FP8 at tensor parallel size 2",
        [(r"use (\d+)", "ffn_hidden_size")],
    ),
    (
        FP8 | {"fp8_linears": "all", "q_lora_rank": 24},
        "q_lora_rank is 24, and FP8 at tensor parallel size 1",
        [(r"use (\d+)", "q_lora_rank")],
    ),
    (
        FP8 | {"fp8_linears": "all", "kv_lora_rank": 36},
        "kv_lora_rank + qk_rope_head_dim is 52, and FP8 at tensor parallel size 1",
        [("use 64", {"kv_lora_rank": 48})],
    ),
    (
        FP8 | {"v_head_dim": 6},
        "num_attention_heads * v_head_dim is 24, and FP8 at tensor parallel size 1",
        [("use 32", {"v_head_dim": 8})],
    ),
    (
        FP8 | {"fp8_recipe": "mxfp8"},
        "fp8_recipe is 'mxfp8'",
        [(r"one of (\w+, \w+, \w+)", "fp8_recipe")],
    ),
    (
        FP8 | {"fp8_recipe": "delayed", "first_last_layers_bf16": True},
        "first_last_layers_bf16 does not work with fp8_recipe 'delayed'",
        [(r"use (\w+) or", "fp8_recipe")],
    ),
    ({"fp8_linears": "some"}, "fp8_linears is 'some'", [(r"one of (.+)", "fp8_linears")]),
    ({"latent_kernels": "cuda"}, "latent_kernels is 'cuda'", [(r"one of (.+)", "latent_kernels")]),
    # Features of Megatron's that this attention does not have.
    (
        {"qk_layernorm": True},
        "qk_layernorm (True)",
        [
            ("leave it out", {"qk_layernorm": False}),
            ("use query_head_norm", {"qk_layernorm": False, "query_head_norm": True}),
            ("or qk_clip", {"qk_layernorm": False, "qk_clip": True}),
        ],
    ),
    (
        {"attention_output_gate": True},
        "attention_output_gate (True)",
        [("use output_gate", {"attention_output_gate": False, "output_gate": True})],
    ),
    *(
        ({name: True}, f"{name} (True)", [("leave it out", {name: False})])
        for name in (
            "add_qkv_bias",
            "apply_query_key_layer_scaling",
            "cache_mla_latents",
            "flash_decode",
            "mla_down_proj_fusion",
            "rotary_interleaved",
        )
    ),
    ({"window_size": (4, 0)}, "window_size ((4, 0))", [("leave it out", {"window_size": None})]),
    (
        {"softmax_type": "off-by-one"},
        "softmax_type ('off-by-one')",
        [(r"use (\w+)", "softmax_type")],
    ),
    (
        {"normalization": "LayerNorm"},
        "normalization ('LayerNorm')",
        [(r"use (\w+)", "normalization")],
    ),
    (
        OFFLOAD | {"recompute_granularity": "full", "recompute_method": "uniform"},
        "recompute_granularity full",
        [
            (
                "use recompute_granularity selective",
                {"recompute_granularity": "selective", "recompute_method": None}
                | {"recompute_modules": ["mlp"]},
            )
        ],
    ),
    (
        OFFLOAD | {"recompute_granularity": "selective"},
        "recompute_modules core_attn rebuilds what offload_modules core_attn",
        [
            ("leave it out of one of them", {"offload_modules": ["qkv_linear"]}),
            ("leave it out of one of them", {"recompute_modules": ["layernorm"]}),
        ],
    ),
    (
        OFFLOAD | {"cuda_graph_impl": "transformer_engine"},
        "cuda_graph_impl transformer_engine does not work with offload_modules core_attn",
        [("use cuda_graph_impl none", {"cuda_graph_impl": "none"})],
    ),
    (
        {"recompute_granularity": "selective", "recompute_modules": ["core_attention"]},
        "core_attention",
        [("core_attn", {"recompute_modules": ["core_attn"]})],
    ),
]


def name_of(row) -> str:
    return " ".join(f"{name}={value}" for name, value in row[0].items())


@pytest.mark.parametrize(("settings", "wrong", "fixes"), ROWS, ids=map(name_of, ROWS))
def test_refused_with_the_wrong_value_and_one_that_works(settings, wrong, fixes):
    with pytest.raises(ValueError) as error:
        MLRAConfig(**(BASE | settings))
    message = str(error.value)
    assert "\n" not in message
    assert wrong in message
    for pattern, field in fixes:
        found = re.search(pattern, message)
        assert found, f"no {pattern!r} in {message!r}"
        if isinstance(field, dict):
            MLRAConfig(**(BASE | settings | field))
            continue
        for text in found[1].split(", "):
            value = int(text) if text.isdigit() else float(text) if "." in text else text
            MLRAConfig(**(BASE | settings | {field: value}))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_latent_heads": 1, "num_branches": 1},
        {"num_latent_heads": 2, "num_branches": 1},
        {"num_branches": 1},
        {"num_branches": 4, "num_attention_heads": 3},
        {"num_latent_heads": 8, "num_branches": 8, "kv_lora_rank": 24},
        {"q_lora_rank": None},
        {"rope_type": "yarn", "rotary_scaling_factor": 1.0},
        {TP: 2},
        {TP: 4},
        {TP: 2, "sequence_parallel": True},
        {TP: 8, "num_attention_heads": 8, "kv_lora_rank": 32, "q_lora_rank": 16}
        | {"qk_pos_emb_head_dim": 8},
        {TP: 2, "latent_tp_layout": "latent"},
        {TP: 6, "num_branches": 3, "latent_tp_layout": "latent"} | TWELVE,
        FP8,
        FP8 | {TP: 2},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mla_up_proj"]},
        OFFLOAD | {"offload_modules": ["qkv_linear", "core_attn", "attn_proj", "attn_norm"]},
        OFFLOAD
        | {"offload_modules": ["qkv_linear"], "recompute_granularity": "selective"}
        | {"recompute_modules": ["core_attn", "mla_up_proj"]},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_what_works_is_not_refused(settings):
    MLRAConfig(**(BASE | settings))


def test_derived_sizes_and_scales():
    config = MLRAConfig(**BASE)
    assert (config.latent_dim, config.num_head_groups) == (7, 2)
    assert config.q_scale == (24 / 12) ** 0.5
    assert config.kv_scale == (24 / 7) ** 0.5
    assert config.branch_scale == 2**-0.5
    assert config.softmax_scale == pytest.approx(10**-0.5)
    assert not config.absorbed  # d_l 7 > d_h 6
    assert MLRAConfig(**(BASE | {"qk_head_dim": 7})).absorbed
    unscaled = MLRAConfig(**(BASE | {"variance_scaling": False}))
    assert (unscaled.q_scale, unscaled.kv_scale, unscaled.branch_scale) == (1.0, 1.0, 1.0)
    assert MLRAConfig(**(BASE | {"q_lora_rank": None})).q_scale == 1.0
