"""The 70 B preset on 1,024 ranks, TP8 x PP8 x DP16, built rank by rank on meta tensors."""

from __future__ import annotations

import json
import math

import pytest

from support.drivers.dry_run import DP, PP, TP, WORLD, rank_id

LAYER = "decoder.layers.{}."
CHUNKS = 2
"""Model chunks of a pipeline stage: the preset's five layers a chunk."""
LAYERS = 5


@pytest.fixture(scope="module")
def dry_run(run_driver):
    return json.loads((run_driver("dry_run", timeout=600) / "dry_run.json").read_text())


@pytest.fixture(scope="module")
def model(dry_run):
    return dry_run["accounting"]


def layer_shapes(model) -> dict[str, tuple[list[int], bool]]:
    """One rank's shapes of one layer's weights, and whether ranks hold different parts, from the
    tables in docs/parallelism.md."""
    d, f, h = model["hidden_size"], model["ffn_hidden_size"], model["num_attention_heads"]
    d_q, d_c = model["q_lora_rank"], model["kv_lora_rank"]
    d_h, d_r = model["qk_nope_head_dim"], model["qk_rope_head_dim"]
    d_v, L, N = model["v_head_dim"], model["num_latent_heads"], model["num_branches"]
    attention = "self_attention."
    return {
        "input_layernorm.weight": ([d], False),
        attention + "linear_q_down_proj.weight": ([d_q // TP, d], True),
        attention + "q_norm.weight": ([d_q // TP], True),
        attention + "linear_q_up_proj.weight": ([h // TP * (d_h + d_r), d_q], True),
        attention + "linear_kv_down_proj.weight": ([(d_c + d_r) // TP, d], True),
        attention + "kv_norm.weight": ([d_c // TP], True),
        attention + "linear_kv_up_proj.weight": ([N, h // TP, d_h + d_v, d_c // L], True),
        attention + "linear_proj.weight": ([d, h * d_v // TP], True),
        "pre_mlp_layernorm.weight": ([d], False),
        "mlp.linear_fc1.weight": ([2 * f // TP, d], True),
        "mlp.linear_fc2.weight": ([d, f // TP], True),
    }


def chunk_shapes(model, pp: int, chunk: int) -> dict[str, tuple[list[int], bool]]:
    """The same of everything a rank of this pipeline stage holds in one chunk."""
    d, vocab = model["hidden_size"], model["padded_vocab_size"]
    shapes = {}
    if (pp, chunk) == (0, 0):
        shapes["embedding.word_embeddings.weight"] = ([vocab // TP, d], True)
    for i in range(LAYERS):
        shapes |= {LAYER.format(i) + name: shape for name, shape in layer_shapes(model).items()}
    if (pp, chunk) == (PP - 1, CHUNKS - 1):
        shapes["decoder.final_layernorm.weight"] = ([d], False)
        shapes["output_layer.weight"] = ([vocab // TP, d], True)
    return shapes


def numbers(rank) -> int:
    """Parameters that a rank holds."""
    return sum(math.prod(shape) for chunk in rank["parameters"] for shape in chunk.values())


def test_it_is_the_70b_model(model):
    assert (model["num_layers"], model["num_attention_heads"]) == (80, 64)
    assert not model["tie_embeddings"]
    assert 65e9 < model["counts"]["total"] < 75e9


def test_ranks_are_where_megatron_puts_them(dry_run):
    assert [(rank["tp"], rank["pp"]) for rank in dry_run["ranks"]] == [
        (tp, pp) for pp in range(PP) for tp in range(TP)
    ]
    for rank in dry_run["ranks"]:
        tp, pp, dp = rank["coordinates"]
        assert (tp, pp) == (rank["tp"], rank["pp"])
        assert rank["rank"] == rank_id(tp, dp, pp)
        assert rank["groups"] == [
            [rank_id(i, dp, pp) for i in range(TP)],
            [rank_id(tp, dp, i) for i in range(PP)],
        ]
    assert dry_run["ids"] == list(range(WORLD))


def test_shapes_of_every_rank(dry_run, model):
    for rank in dry_run["ranks"]:
        expected = [
            {name: shape for name, (shape, _) in chunk_shapes(model, rank["pp"], chunk).items()}
            for chunk in range(CHUNKS)
        ]
        assert rank["parameters"] == expected, f"rank {rank['rank']}"


def test_parameters_sum_to_the_accounting_and_the_preset(dry_run, model):
    total = 0
    for rank in dry_run["ranks"]:
        for chunk, held in enumerate(rank["parameters"]):
            expected = chunk_shapes(model, rank["pp"], chunk)
            total += sum(
                math.prod(shape)
                for name, shape in held.items()
                if expected[name][1] or rank["tp"] == 0
            )
    assert total == model["counts"]["total"]
    assert total == sum(key["elements"] for key in dry_run["keys"].values())


def test_checkpoint_covers_every_tensor_once(dry_run, model):
    keys = dry_run["keys"]
    for name, key in keys.items():
        assert key["held"] == key["elements"], name
        assert key["overlaps"] == 0, name
    # Every other rank's copy is marked as one: 16 data-parallel ranks, and 8 tensor-parallel ones
    # of what they do not split.
    layers = {name for name in keys if name.startswith("decoder.layers.")}
    assert len(layers) == len(layer_shapes(model))
    for name in layers:
        replicated = "layernorm" in name or "layer_norm" in name
        copies = DP * TP if replicated else DP
        assert key_copies(keys[name]) == copies, name
    assert key_copies(keys["embedding.word_embeddings.weight"]) == DP
    assert key_copies(keys["output_layer.weight"]) == DP
    assert key_copies(keys["decoder.final_layernorm.weight"]) == DP * TP


def key_copies(key: dict[str, int]) -> float:
    return (key["pieces"] + key["copies"]) / key["pieces"]


def test_megatron_accepts_the_sharding(dry_run):
    assert dry_run["megatron"] == ""


def test_distributed_optimizer_owns_every_element_once(dry_run):
    # The driver fails where the ranges of one parameter leave a gap or overlap.
    for rank in dry_run["ranks"]:
        held = numbers(rank)
        assert len(rank["optimizer"]) == DP
        assert sum(rank["optimizer"]) == held
        assert max(rank["optimizer"]) <= 1.001 * held / DP


def test_pipeline_balance(dry_run, model):
    assert model["num_layers"] == PP * CHUNKS * LAYERS
    stages = {}
    for rank in dry_run["ranks"]:
        # Interleaved: the stages take turns.
        firsts = [LAYERS * (chunk * PP + rank["pp"]) + 1 for chunk in range(CHUNKS)]
        assert rank["layers"] == [list(range(first, first + LAYERS)) for first in firsts]
        held = numbers(rank)
        assert stages.setdefault(rank["pp"], held) == held, "tensor-parallel ranks differ"
    embedding = model["padded_vocab_size"] * model["hidden_size"] // TP
    middle = stages[1]
    assert stages == {
        0: middle + embedding,
        **dict.fromkeys(range(1, PP - 1), middle),
        PP - 1: middle + embedding + model["hidden_size"],
    }
    # The last stage also computes the output layer, which costs a little more than one of its ten
    # layers; the first only looks rows up.
    output = 6 * model["padded_vocab_size"] * model["hidden_size"]
    stage = (model["flops_per_token"] - output) / PP
    assert 1.10 < (stage + output) / stage < 1.11
