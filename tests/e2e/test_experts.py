"""A mixture of experts from the entry at EP2 to text, and back into the entry."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_mlra.checkpoint.cli import main as convert
from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.inference.cli import main as generate
from support.runs import Run

# As the 16B preset's, smaller.
EXPERTS = """
base: {preset}
num_layers: 3
vocab_size: 272
num_experts: 4
moe_layer_freq: ([0]+[1]*2)
moe_ffn_hidden_size: 32
moe_shared_expert_intermediate_size: 48
moe_router_topk: 2
moe_router_pre_softmax: true
moe_router_load_balancing_type: seq_aux_loss
moe_aux_loss_coeff: 1.0e-3
moe_token_dispatcher_type: alltoall
use_distributed_optimizer: true
dist_ckpt_optim_fully_reshardable: false
"""


@pytest.fixture(scope="module")
def moe_preset(tmp_path_factory, preset) -> Path:
    path = tmp_path_factory.mktemp("moe") / "moe.yaml"
    path.write_text(EXPERTS.format(preset=preset))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, entry, moe_preset) -> Run:
    """Four steps, each rank with two of four experts."""
    folder = tmp_path_factory.mktemp("trained-moe")
    argv = ["--config", moe_preset, "--save", folder / "save", "--expert-model-parallel-size", 2]
    run = entry.run(folder, *argv, "--exit-interval", 4, ranks=2)
    assert run.code == 0, run.err
    return run


@pytest.fixture(scope="module")
def exported(trained) -> Path:
    """The Hugging Face folder."""
    folder = trained.folder / "exported"
    assert convert(["export-hf", str(trained.folder / "save"), str(folder), "--quiet"]) == 0
    return folder


@pytest.mark.parametrize("layout", ["alone", "tp2"])
def test_exported_and_imported_it_has_the_same_loss(
    layout, trained, exported, entry, moe_preset, tmp_path
):
    argv = ["import-hf", exported, tmp_path / "back", "--padded-vocab-size", 272, "--quiet"]
    assert convert([*map(str, argv)]) == 0
    argv = ["--config", moe_preset, "--load", tmp_path / "back", "--eval-at-start"]
    if layout == "tp2":
        argv += ["--tensor-model-parallel-size", 2, "--sequence-parallel"]
    run = entry.run(
        tmp_path / "run", *argv, "--exit-interval", 1, ranks=2 if layout == "tp2" else 0
    )
    assert run.code == 0, run.err
    expected, found = (
        re.findall(r"validation at step \d+: lm loss ([\d.]+)", text)[0]
        for text in (trained.out, run.out)
    )
    assert found == expected


def test_it_generates(trained, exported, capsys, tmp_path):
    save = trained.folder / "save"
    assert open_checkpoint(save).description.variant == "MLRA-4 MoE"
    records = []
    for folder in (save, exported):
        out = tmp_path / f"{folder.name}.jsonl"
        flags = ["--prompt", "def ", "--max-new-tokens", "12", "--ignore-eod", "--device", "cpu"]
        flags += ["--tokenizer", "byte", "--output", str(out)]
        assert generate([str(folder), *flags]) == 0, capsys.readouterr().err
        records.append(json.loads(out.read_text()))
    assert records[0] == records[1] and len(records[0]["tokens"]) == 12


def test_other_routing_is_another_architecture(trained, entry, moe_preset, tmp_path):
    argv = ["--config", moe_preset, "--load", trained.folder / "save"]
    run = entry.run(tmp_path, *argv, "--moe-router-topk-scaling-factor", 2.5)
    assert run.code == 2 and "moe_router_topk_scaling_factor is None there, 2.5 here" in run.err


def test_the_optimizer_of_spread_experts_is_another_one(trained, entry, moe_preset, tmp_path):
    argv = ["--config", moe_preset, "--load", trained.folder / "save", "--exit-interval", 5]
    run = entry.run(tmp_path / "parts", *argv, ranks=2)
    assert run.code == 2 and run.err.count("\n") == 1
    said = "--expert-model-parallel-size is 2 there, 1 here; use the same, or add --no-load-optim"
    assert said in run.err
    save, argv = tmp_path / "save", ["--config", moe_preset, "--dist-ckpt-optim-fully-reshardable"]
    spread = ["--save", save, "--expert-model-parallel-size", 2, "--exit-interval", 4]
    run = entry.run(tmp_path / "first", *argv, *spread, ranks=2)
    assert run.code == 0, run.err
    argv += ["--load", save, "--exit-interval", 5]
    run = entry.run(tmp_path / "refused", *argv, ranks=2)
    assert run.code == 2 and run.err.count("\n") == 1
    said = "has the optimizer of --expert-model-parallel-size 2, and this run has 1: Megatron"
    assert said in run.err and "use one above 1, or add --no-load-optim" in run.err
    run = entry.run(tmp_path / "fresh", *argv, "--no-load-optim", ranks=2)
    assert run.code == 0 and "continuing after step 4" in run.out, run.err
