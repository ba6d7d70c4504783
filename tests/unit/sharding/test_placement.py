"""The table of every weight: ranks' parts make the whole, and the documentation shows it."""

import math
from itertools import product

import numpy as np
import pytest

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.tensors import layer_tensors
from megatron_mlra.inference.parallel import HeadShard
from megatron_mlra.sharding.fit import misfit
from megatron_mlra.sharding.partition import LatentShard
from megatron_mlra.sharding.placement import (
    local_shape,
    placements,
    serving_share,
    training_share,
)
from support import ROOT

FAMILY = [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4), (8, 8)]


def model(L: int, N: int, **changes: object) -> ModelDescription:
    sizes = {
        "num_layers": 1,
        "hidden_size": 24,
        "ffn_hidden_size": 32,
        "num_attention_heads": 16,
        "vocab_size": 64,
        "num_latent_heads": L,
        "num_branches": N,
        "q_lora_rank": 32,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 16,
        "v_head_dim": 10,
        "query_head_norm": True,
        "output_gate": True,
    }
    return ModelDescription(**(sizes | changes))


@pytest.mark.parametrize("q_lora_rank", [32, None])
@pytest.mark.parametrize(("L", "N"), FAMILY)
def test_names_and_shapes_are_those_of_checkpoints(L, N, q_lora_rank):
    described = model(L, N, q_lora_rank=q_lora_rank)
    stored = {
        name.removeprefix("self_attention.").removesuffix(".weight"): shape
        for name, shape in layer_tensors(described, 0).items()
        if name.startswith("self_attention.")
    }
    assert {name: placed.shape for name, placed in placements(described).items()} == stored


@pytest.mark.parametrize("layout", ["head", "latent"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize(("L", "N"), FAMILY)
def test_training_parts_make_the_whole_once(L, N, tp, layout):
    described = model(L, N)
    if misfit(tp, layout, described):
        return
    for name, placed in placements(described).items():
        count = np.zeros(placed.shape, dtype=int)
        for rank in range(tp):
            share = training_share(described, LatentShard.plan(described, tp, rank, layout))
            parts = placed.boxes(share)
            for box in parts:
                count[box] += 1
            joined = np.concatenate([count[box] for box in parts])
            assert joined.shape == local_shape(placed, share)
            assert joined.size == math.prod(placed.shape) // tp
        assert (count == 1).all(), name


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("weight_mode", ["replicated", "sharded"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize(("L", "N"), FAMILY)
def test_served_parts_cover_the_whole(L, N, tp, weight_mode, context):
    described = model(L, N)
    counts = {}
    for name, placed in placements(described).items():
        counts[name] = np.zeros(placed.shape, dtype=int)
        for rank, turn in product(range(tp), range(context)):
            try:
                shard = HeadShard.plan(described, tp, rank, weight_mode, context, turn)
            except ValueError:
                assert context > 1
                return
            heads = (
                (shard.own_start, shard.own_heads)
                if name in ("linear_proj", "linear_gate_proj")
                else (shard.query_start, shard.query_heads)
            )
            share = serving_share(described, shard.core, *heads)
            for box in placed.boxes(share):
                counts[name][box] += 1
        assert (counts[name] > 0).all(), name
    assert (counts["linear_kv_up_proj"] == context).all()
    assert (counts["linear_kv_down_proj"][-described.qk_rope_head_dim :] == tp * context).all()
    assert (counts["kv_norm"] == context * max(1, tp // L)).all()
    if weight_mode == "sharded":
        assert (counts["linear_proj"] == 1).all()


def test_the_documentation_shows_the_table():
    lines = ["| parameter | global shape | training | inference |", "|---|---|---|---|"]
    for name, placed in placements(model(4, 4)).items():
        shown = f"`{name}`" + " (optional)" * (name in ("query_head_norm", "linear_gate_proj"))
        lines.append(f"| {shown} | `{placed.letters}` | {placed.cut} | {placed.served} |")
    assert "\n".join(lines) in (ROOT / "docs/parallelism.md").read_text()
