"""Checkpoints across precision recipes and implementations on a GPU: the same weights everywhere.

python -m pytest -m gpu tests/gpu/test_checkpoint_recipes.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.te_sizes import SIZES

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("world")]

RUNS = {
    "torch": ("local", {}),
    "bf16": ("transformer_engine", {}),
    **{
        recipe: ("transformer_engine", {"fp8": "hybrid", "fp8_recipe": recipe})
        for recipe in ("delayed", "tensorwise", "blockwise")
    },
}


def build(name: str):
    from megatron.core.models.gpt import GPTModel

    from megatron_mlra.layers.specs import block_spec
    from support.samples import SEQ, VOCAB
    from support.tiny import Layout, make_config

    implementation, precision = RUNS[name]
    config = make_config(Layout(), transformer_impl=implementation, **SIZES, **precision)
    return GPTModel(
        config,
        block_spec(config),
        VOCAB,
        SEQ,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    ).cuda()


def logits(model) -> torch.Tensor:
    from support.samples import SEQ, global_batch

    tokens = global_batch(0).cuda()[:, :-1].contiguous()
    positions = torch.arange(SEQ, device="cuda")[None].expand(len(tokens), -1)
    with torch.no_grad():
        return model(tokens, positions, None).float()


def sharded(model) -> dict:
    from megatron.core import parallel_state as mpu

    group = mpu.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata={"dp_cp_group": group})


@pytest.mark.parametrize("saved", RUNS)
def test_loads_into_every_other(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    # Transformer Engine pickles the factors of the delayed recipe; these files are the test's own.
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    source = build(saved)
    # Scaling factors of the delayed recipe are there only once it has run.
    logits(source)
    (tmp_path / "weights").mkdir()
    dist_checkpointing.save(sharded(source), str(tmp_path / "weights"))
    weights = {
        key: entry.data.detach().clone()
        for key, entry in sharded(source).items()
        if isinstance(getattr(entry, "data", None), torch.Tensor) and "_extra_state" not in key
    }
    for name in RUNS:
        target = build(name)
        state = dist_checkpointing.load(
            sharded(target), str(tmp_path / "weights"), strict=StrictHandling.LOG_ALL
        )
        missing, unexpected = target.load_state_dict(state, strict=False)
        assert all("_extra_state" in key for key in (*missing, *unexpected)), (name, missing)
        logits(target)
        for key, weight in target.state_dict().items():
            stored = weights.get(key)
            if isinstance(stored, torch.Tensor) and isinstance(weight, torch.Tensor):
                assert torch.equal(weight, stored), (name, key)
