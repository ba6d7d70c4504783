"""Megatron's flags of memory and overlap: the table has them all, and refusals say the fix."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
from unittest.mock import Mock

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_mlra.description.megatron_args import from_megatron_args
from megatron_mlra.training import memory_check, memory_flags, progress
from megatron_mlra.training.arguments import parse
from megatron_mlra.training.dry_run import layout_of
from support import CONFIGS, ROOT

DEBUG = ["--config", str(CONFIGS / "debug.yaml")]

PATTERN = re.compile(
    "offload|recompute|overlap|fsdp|wgrad|shard|nccl|bucket|stash|delay|memory|distribute-saved"
    "|precision-aware|main-grads|exp-avg|param-gather|accumulation-fusion|meta-device|double-buffer"
    "|div-fusion|num-distributed-optimizer-instances|use-distributed-optimizer"
)
"""Matches the names of flags of memory and overlap."""

OTHER_GROUPS = ("network size", "rl", "vision", "logging", "inference", "fault injector")
"""Groups of Megatron's parser with such names, but no flag that changes a training step."""


def upstream_flags(parser: argparse.ArgumentParser) -> set[str]:
    """The flags of memory and overlap of Megatron's parser, each by its last spelling."""
    return {
        action.option_strings[-1]
        for group in parser._action_groups
        if group.title not in OTHER_GROUPS
        for action in group._group_actions
        if action.option_strings and PATTERN.search(" ".join(action.option_strings))
    }


def test_every_flag_of_megatron_has_a_row():
    theirs = upstream_flags(add_megatron_arguments(argparse.ArgumentParser()))
    ours = " ".join(row.flags for row in memory_flags.ROWS).split()
    assert len(ours) == len(set(ours))
    new, gone = theirs - set(ours), set(ours) - theirs
    assert not new, f"new in Megatron: {sorted(new)}; try each, then give it a row of ROWS"
    assert not gone, f"gone from Megatron: {sorted(gone)}; remove them from ROWS"


def test_a_new_flag_would_be_seen():
    parser = add_megatron_arguments(argparse.ArgumentParser())
    parser.add_argument_group("training").add_argument("--offload-everything")
    assert "--offload-everything" in upstream_flags(parser)


def test_the_documentation_has_the_table():
    assert memory_flags.table() in (ROOT / "docs/parallelism.md").read_text(encoding="utf-8")


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--use-torch-fsdp2",
            "--use-torch-fsdp2 fails on tied embeddings; use --use-megatron-fsdp",
        ),
        ("--init-model-with-meta-device", "leaves MLRA's weights without values; leave it out"),
        ("--tensor-parallel-num-weight-shards 2", "--tensor-parallel-num-weight-shards 2 cuts"),
        ("--ckpt-format torch", "--ckpt-format torch is not read here; leave it out"),
        ("--cpu-offloading-num-layers 1", "--cpu-offloading-num-layers needs Transformer Engine"),
        (
            "--fine-grained-activation-offloading --offload-modules core_attn",
            "--fine-grained-activation-offloading needs Transformer Engine and a GPU",
        ),
        ("--delay-wgrad-compute", "--delay-wgrad-compute needs Transformer Engine and a GPU"),
        (
            "--recompute-granularity selective --recompute-modules mlp layernorm",
            "--recompute-modules layernorm fails in Megatron 0.19.2 without Transformer Engine",
        ),
        (
            "--dry-run 1 --fine-grained-activation-offloading",
            "--dry-run does not count what --fine-grained-activation-offloading moves",
        ),
        ("--dry-run 1 --use-megatron-fsdp", "--dry-run does not count what --use-megatron-fsdp"),
        (
            "--use-megatron-fsdp --save runs/a",
            "--use-megatron-fsdp with --save runs/a: nothing here reads its checkpoints; use"
            " --use-distributed-optimizer",
        ),
        ("--use-megatron-fsdp --load runs/a", "--use-megatron-fsdp with --load runs/a"),
        (
            "--use-megatron-fsdp --expert-model-parallel-size 2",
            "--expert-model-parallel-size 2 has not been tried; use 1",
        ),
        (
            "--use-precision-aware-optimizer --use-distributed-optimizer",
            "--use-precision-aware-optimizer needs Transformer Engine's Adam on a GPU; install",
        ),
        (
            "--use-precision-aware-optimizer --no-use-distributed-optimizer",
            "--use-precision-aware-optimizer needs --use-distributed-optimizer; add it",
        ),
        ("--exp-avg-dtype bf16", "--exp-avg-dtype bf16 needs --use-precision-aware-optimizer; add"),
        *(
            (f"--optimizer muon {name}", f"{name} knows Adam alone, and --optimizer is muon; leave")
            for name in (
                "--use-precision-aware-optimizer",
                "--optimizer-cpu-offload",
                "--use-megatron-fsdp",
            )
        ),
    ],
)
def test_what_cannot_work_is_one_line(flags, words, environment):
    with pytest.raises(ValueError) as error:
        parse([*DEBUG, *flags.split()])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_megatron_fsdp_gets_what_it_needs(environment):
    args = parse([*DEBUG, "--use-megatron-fsdp"])
    assert (args.ckpt_format, args.verify_integrity) == ("fsdp_dtensor", False)
    assert not args.gradient_reduce_div_fusion
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] != "1"


def test_megatron_fsdp_without_einops_is_one_line(environment, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--use-megatron-fsdp needs einops; pip install einops"):
        parse([*DEBUG, "--use-megatron-fsdp"])


@pytest.mark.parametrize("offloads", [False, True])
def test_a_validation_before_training_teaches_megatron_no_offloading(offloads, monkeypatch):
    """From the groups of a pass without gradients, Megatron would fail in the first backward."""
    done = []
    args = argparse.Namespace(
        consumed_valid_samples=3, iteration=0, fine_grained_activation_offloading=offloads
    )
    training = progress.training
    monkeypatch.setattr(training, "should_disable_forward_pre_hook", lambda _: False)
    monkeypatch.setattr(
        training, "evaluate_and_print_results", lambda *_, **__: done.append("evaluated")
    )
    offloading = progress.FineGrainedActivationOffloadingInterface
    monkeypatch.setattr(offloading, "reset_instance", lambda: done.append("forgotten"))
    progress.Progress._evaluate_first(Mock(args=args), *[None] * 6)
    assert done == ["evaluated", "forgotten"][: 1 + offloads]


def test_a_model_that_surely_does_not_fit_is_refused(tmp_path, monkeypatch):
    def check(*flags: str, config: str = "mlra4_2.9b", **changed) -> None:
        args = parse(["--config", config, "--mock-data", "--no-bf16", *flags])
        vars(args).update(virtual_pipeline_model_parallel_size=None, data_parallel_size=1)
        vars(args).update(changed)
        memory_check.check(args, from_megatron_args(args), layout_of(args), on_cpu=True)

    memory, swap = Mock(available=20 * 2**30), Mock(free=2**30)
    monkeypatch.setattr(memory_check.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(memory_check.psutil, "swap_memory", lambda: swap)
    (tmp_path / "memory.max").write_text("max\n")
    free = memory_check.free_host_bytes(tmp_path)
    assert free == memory_check.free_host_bytes(tmp_path / "none") == 21 * 2**30
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    assert memory_check.free_host_bytes(tmp_path) == 2**30
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text(f"{3 * 2**30}\n")
    assert memory_check.free_host_bytes(tmp_path) == 3 * 2**30
    monkeypatch.setattr(memory_check, "free_host_bytes", lambda: free)
    check(config="debug")
    with pytest.raises(ValueError, match=r"at least 4\d.\d GiB per rank .* 21.0 GiB of memory are"):
        check()
    # Weights alone fit, as does what cannot be counted.
    check("--skip-train")
    check(use_megatron_fsdp=True)
    check("--optimizer", "sgd", bf16=True, accumulate_allreduce_grads_in_fp32=False)
    with pytest.raises(ValueError, match="use --use-distributed-optimizer, a smaller preset"):
        check(data_parallel_size=8, use_distributed_optimizer=False)
    # The ranks of a host share its memory.
    free = 8 * 2**30
    args = {"data_parallel_size": 2, "use_distributed_optimizer": True}
    check("--num-layers", "4", **args)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="for the 2 ranks of this host, and"):
        check("--num-layers", "4", **args)


def test_a_finished_run_says_how_to_go_on():
    args = argparse.Namespace(iteration=39, train_iters=40, train_samples=None, load="run")
    assert progress.resumed(args) == "continuing after step 39 of run"
    args.iteration = 40
    assert progress.resumed(args) == (
        "step 40 of 40 is the end, and run has it; to train on, give a larger --train-iters and"
        " --override-opt-param-scheduler"
    )
    args.train_samples = 160
    assert "a larger --train-samples and" in progress.resumed(args)
