"""`--dry-run`: the plan, who owns what and the command, for any number of GPUs, without one."""

import json
import shlex
import subprocess
from types import SimpleNamespace

import pytest
import torch

from megatron_mlra.description.presets import preset_values
from megatron_mlra.layers.config import MLRAConfig
from megatron_mlra.planner.cli import shape_of
from megatron_mlra.training.console import mlp_note
from megatron_mlra.training.dry_run import _command, _shard_map
from support import CONFIGS, ENV, ROOT
from support.programs import program


def test_a_launch_of_1024_gpus_is_described_and_nothing_started(warm_python, tmp_path):
    config = "mlra4_70b"
    command = [warm_python, ROOT / "pretrain_mlra.py", "--config", config]
    command += ["--dry-run", "1024", "--data-path", "nowhere", "--save", tmp_path / "save"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert not done.stderr and not list(tmp_path.iterdir())
    assert said[0].startswith("training MLRA-4: 70,553,901,056 parameters")
    (memory,) = (line for line in said if line.startswith("  memory: "))
    assert ", fits in " in memory
    assert sum(line.startswith("  rank ") for line in said) == 4
    assert sum(line.startswith("  stage ") for line in said) == 4
    assert said[-1] == (
        "command, the same on every node: mlra launch --nnodes 128 --rdzv-backend c10d"
        " --rdzv-endpoint FIRST_HOST:29500 --rdzv-id JOB --nproc-per-node 8 -m"
        f" megatron_mlra.training --config {config} --data-path nowhere --save {tmp_path / 'save'}"
        f" --load {tmp_path / 'save'}"
    )


@pytest.mark.parametrize(
    ("changed", "noted"),
    [
        ({}, True),
        ({"bf16": False}, False),
        ({"tensor_model_parallel_size": 1}, False),
        ({"dry_run": None}, torch.cuda.is_available()),
    ],
)
def test_a_run_on_gpus_notes_sizes_that_ranks_cut_badly(changed, noted):
    shape = shape_of(preset_values(CONFIGS / "mlra4_2.9b.yaml"))
    args = {"dry_run": 2, "bf16": True, "fp16": False, "tensor_model_parallel_size": 2}
    args["expert_tensor_parallel_size"] = None
    line = mlp_note(SimpleNamespace(**(args | changed)), shape)
    assert ("9880 is 4940 on each of 2 ranks" in line) == bool(line) == noted


@pytest.mark.parametrize(
    ("preset", "gpus", "asked"),
    [
        ("mlra4_70b", 1024, []),
        ("debug", 8, []),
        # Longer than the preset's positions.
        ("mlra4_7b", 64, ["--seq-length", 131072]),
    ],
)
def test_the_planners_command_is_its_layout(entry, tmp_path, preset, gpus, asked):
    plan = ["--config", preset, "--gpus", gpus, *asked, "--json"]
    planned = subprocess.run(
        [program("mlra"), "plan", *map(str, plan)], capture_output=True, text=True, env=ENV
    )
    report = json.loads(planned.stdout)
    words = shlex.split("".join(line.removesuffix("\\") for line in report["command"]))
    flags = words[words.index("--config") :]
    run = entry.run(tmp_path, *flags, "--dry-run", gpus)
    assert run.code == 0, run.err
    best = report["layouts"][0]["layout"]
    cp = f" CP{best['cp']}" if best["cp"] > 1 else ""
    vpp = f" (x{best['vpp']})" if best["vpp"] > 1 else ""
    layout = f"TP{best['tp']}{cp} PP{best['pp']}{vpp}"
    assert f"plan: {layout} DP{best['dp']} on {gpus:,} x h100" in run.out
    small = preset == "debug"
    assert (" MiB on the fullest GPU" in run.out) == (" ms, " in run.out) == small


def shard_map(tp: int, layout: str) -> list[str]:
    config = MLRAConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=32,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_head_dim=16,
        qk_pos_emb_head_dim=32,
        v_head_dim=16,
        num_latent_heads=4,
        num_branches=4,
        latent_tp_layout=layout,
        tensor_model_parallel_size=tp,
        normalization="RMSNorm",
    )
    return _shard_map(SimpleNamespace(tensor_model_parallel_size=tp), config)


def test_the_shard_map_names_every_rank_and_shortens_many():
    lines = shard_map(8, "latent")
    assert len(lines) == 9
    assert lines[4].startswith("  rank 3: projections of heads 12-15; core: branches 1 of heads")
    assert "heads 16-31, latents 1" in lines[4]
    lines = shard_map(32, "head")
    assert len(lines) == 18
    assert lines[16] == "  ... 16 more alike"
    assert lines[17].startswith("  rank 31: projections of heads 31;")


def test_the_command_is_the_same_without_the_dry_run():
    def command(gpus: int, argv: list[str], tp: int = 1) -> str:
        return _command(SimpleNamespace(world_size=gpus, tensor_model_parallel_size=tp), argv)

    argv = ["--config", "a b.yaml", "--dry-run", "16", "--dry-run-gpu=h200", "--bf16"]
    said = command(16, argv)
    assert said.startswith("command, the same on every node: mlra launch --nnodes 2 ")
    end = " -m megatron_mlra.training --config 'a b.yaml' --bf16 --save"
    assert said.endswith(f" --nproc-per-node 8{end} RUN --load RUN")
    said = command(4, ["--save=x y", *argv, "--load", "z"])
    assert said == f"command: mlra launch --standalone --nproc-per-node 4{end} 'x y' --load z"
    said = command(12, argv)
    assert " --nnodes 2 " in said and " --nproc-per-node 6 " in said
    # A tensor-parallel group stays within a node.
    assert " --nnodes 5 " in (said := command(20, argv, tp=4)) and " --nproc-per-node 4 " in said


@pytest.mark.parametrize(
    ("asked", "flag"),
    [
        (("--decoder-first-pipeline-num-layers", 1), "--decoder-first-pipeline-num-layers"),
        (("--decoder-last-pipeline-num-layers", 1), "--decoder-last-pipeline-num-layers"),
        (("--pipeline-model-parallel-layout", "Et|t*3L"), "--pipeline-model-parallel-layout"),
        (
            ("--num-layers", 3, "--account-for-embedding-in-pipeline-split"),
            "--account-for-embedding-in-pipeline-split",
        ),
    ],
)
def test_stages_of_unequal_numbers_of_layers_are_not_told_as_equal(entry, tmp_path, asked, flag):
    flags = ("--config", "debug", "--mock-data", "--pipeline-model-parallel-size", 2)
    run = entry.run(tmp_path, *flags, *asked, "--dry-run", 2)
    assert run.code == 0, run.err
    assert f"plan: none, since the planner cuts layers evenly, and {flag} does not\n" in run.out
    assert f"  as {flag} and Megatron divide them\n" in run.out and "  stage " not in run.out
