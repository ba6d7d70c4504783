"""The vLLM plugin cuts weights and turns positions as the project's engine does, on every rank."""

from __future__ import annotations

import pytest
import torch

from megatron_mlra.checkpoint.huggingface.config import to_hf_config
from megatron_mlra.checkpoint.huggingface.names import rules
from megatron_mlra.inference.parallel import TensorParallel
from megatron_mlra.inference.weights import load_weights
from megatron_mlra.maths.rope import rotary_tables as engine_tables
from mlra_vllm.config import MLRAConfig
from mlra_vllm.rope import rotary_tables
from mlra_vllm.shard import padded_mlp_size, plan
from mlra_vllm.weights import sources
from support.hf_cases import CASES
from support.random_checkpoint import RandomFolder

LATENT = [name for name, model in CASES.items() if model.attention == "mlra"]
PREFIX = "model.layers.0.self_attn."


def cut(name: str, tp: int, rank: int) -> dict[str, torch.Tensor]:
    """The plugin's parameters of the first layer, filled from an export's tensors."""
    folder = RandomFolder(CASES[name])
    config = MLRAConfig(**to_hf_config(folder.description))
    shard = plan(config.num_attention_heads, config.num_latent_heads, config.num_branches, tp, rank)
    exported = {
        their: part
        for ours, rule in rules(folder.description).items()
        for their, part in rule.store(folder.tensor(ours))
        if their.startswith(PREFIX)
    }
    table = sources(config, shard)
    assert {PREFIX + name for name in table} == exported.keys()
    found: dict[str, list] = {}
    for source_name, source in table.items():
        tensor = exported[PREFIX + source_name]
        assert tuple(tensor.shape) == source.shape
        for (parameter, rows), part in zip(source.targets, source.cut(tensor), strict=True):
            found.setdefault(parameter, []).append((rows.start or 0, part))
    return {
        parameter: torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])])
        for parameter, parts in found.items()
    }


@pytest.mark.parametrize("name", LATENT)
def test_every_rank_has_the_weights_of_the_engine(name):
    folder, seen = RandomFolder(CASES[name]), 0
    for tp in (1, 2, 4, 8):
        for rank in range(tp):
            engine = load_weights(
                folder.description, folder.tensor, TensorParallel.share(tp, rank), "replicated",
                torch.float32, "cpu",
            )  # fmt: skip
            theirs = engine.layers[0].attention
            expected = {
                "down": theirs.down,
                "q_up": theirs.q_up,
                "proj": theirs.proj,
                "attn.kv_norm": theirs.kv_norm,
                "attn.w_uk": theirs.w_uk,
                "attn.w_uv": theirs.w_uv,
            }
            if theirs.q_norm is not None:
                expected["q_norm.weight"] = theirs.q_norm
            if theirs.head_norm is not None:
                expected["query_head_norm"] = theirs.head_norm
            if theirs.gate is not None:
                expected["gate"] = theirs.gate
            mlp = engine.layers[0].mlp
            part = padded_mlp_size(folder.description.ffn_hidden_size, tp) // tp
            assert part % 16 == 0
            if not folder.description.is_moe(0):
                assert mlp.fc1.shape[0] // 2 == mlp.fc2.shape[1] == part
            ours = cut(name, tp, rank)
            assert ours.keys() == expected.keys()
            for parameter, value in expected.items():
                assert torch.equal(ours[parameter], value), (parameter, tp, rank)
                seen += 1
    assert seen >= 15 * 6


@pytest.mark.parametrize("name", LATENT)
def test_rope_tables_are_those_of_the_engine(name):
    model = CASES[name]
    ours = rotary_tables(MLRAConfig(**to_hf_config(model)), 1000)
    for mine, theirs in zip(ours, engine_tables(model, 1000), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
