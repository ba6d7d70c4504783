"""Numbers of flags that cannot work, refused before torch is imported."""

from __future__ import annotations

import re
from argparse import Namespace

import pytest

from megatron_mlra.training import (
    all_flags,
    argument_checks,
    arguments,
    early_checks,
    interval_checks,
    value_checks,
)
from megatron_mlra.training.expert_checks import check_experts

BOUNDS = [
    *((name, value, "at least 1") for name in value_checks.POSITIVE for value in (0, -1)),
    *((name, -1, "at least 0") for name in value_checks.AT_LEAST_0),
    *((name, value, "at least 0 and below 1") for name in value_checks.SHARES for value in (-1, 1)),
    *((name, value, "from 0 to 1") for name in value_checks.PARTS for value in (-1, 2)),
    *((name, value, "above 0") for name in value_checks.ABOVE_0 for value in (0, -1)),
]


def refused(words: str) -> str:
    with pytest.raises(ValueError) as raised:
        early_checks.parsed(["--config", "debug", "--mock-data", *words.split()])
    return str(raised.value)


EXPERTS = "--num-experts 4 --moe-router-topk 2"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--save-wgrads-interval 2", "--save-wgrads-interval 2 needs a folder; add --save"),
        (
            "--save S --save-dgrads-interval 2",
            "--save-dgrads-interval 2 fails in Megatron 0.19.2 without Transformer Engine; install",
        ),
        (
            "--save-interval 4 --save-retain-interval 6",
            "--save-retain-interval 6 is no multiple of --save-interval 4; use 8",
        ),
        (
            "--log-interval 2 --log-memory-interval 3",
            "--log-memory-interval 3 is no multiple of --log-interval 2; use 4",
        ),
        (
            "--profile --use-pytorch-profiler --profile-step-end 10",
            "--profile-step-end 10 is not behind --profile-step-start 10; use at least 11",
        ),
        ("--profile", "--profile needs a GPU, and there is none; add --use-pytorch-profiler, or"),
        ("--gpu-sniff-test-interval 5", "--gpu-sniff-test-interval 5 needs a GPU, and there is"),
        (
            "--num-distributed-optimizer-instances 2",
            "--num-distributed-optimizer-instances 2 does not divide the 1 ranks that share an opt",
        ),
        (
            "--phase-transition-iterations 4",
            "--phase-transition-iterations 4 needs a length in samples; add --train-samples",
        ),
        ("--enable-ft-package", "--enable-ft-package needs nvidia-resiliency-ext; pip install it"),
        (f"{EXPERTS} --moe-latent-size 8", "--moe-latent-size 8 needs Transformer Engine and a "),
        (
            f"{EXPERTS} --moe-router-num-groups 2",
            "--moe-router-num-groups 2 has no effect without --moe-router-group-topk; add it",
        ),
    ],
)
def test_numbers_that_do_not_fit_the_other_flags(words, said, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(argument_checks.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(argument_checks, "HAVE_TE", False)
    monkeypatch.setattr(interval_checks, "HAVE_TE", False)
    with pytest.raises(ValueError) as raised:
        arguments.parse(["--config", "debug", "--mock-data", *words.split()])
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--data-seed -1", "--data-seed is -1; it must be at least 0"),  # no samples
        ("--recompute-num-layers 0", "--recompute-num-layers is 0; it must be"),  # waited for ever
        ("--kv-channels 0", "--kv-channels is 0; it must be at least 1"),
        ("--num-query-groups 0", "--num-query-groups is 0; it must be at least 1"),
        ("--moe-router-topk 0", "--moe-router-topk is 0; it must be at least 1"),
        ("--save-wgrads-interval 0", "--save-wgrads-interval is 0; it must be at least 1"),
        ("--eval-micro-batch-size -1", "--eval-micro-batch-size is -1; it must be at least 1"),
        ("--num-distributed-optimizer-instances 0", "-instances is 0; it must be at least 1"),
        ("--adam-eps 0", "--adam-eps is 0.0; it must be above 0"),
        ("--mup-base-head-dim -1", "--mup-base-head-dim is -1.0; it must be above 0"),
        ("--rotary-percent -1", "--rotary-percent is -1.0; it must be from 0 to 1"),
        ("--moe-input-jitter-eps 1e9", "--moe-input-jitter-eps is 1000000000.0; it must be above"),
        ("--moe-aux-loss-coeff 0.1 -1", "--moe-aux-loss-coeff is -1.0; it must be at least 0"),
        ("--iterations-to-skip 3 0", "--iterations-to-skip is 0; it must be at least 1"),
        ("--num-workers 1000000000", "--num-workers is 1000000000; it must be at most 1024"),
        ("--encoder-seq-length 64", "--encoder-seq-length is --seq-length by an older name; use"),
        ("--decoder-seq-length -1", "--decoder-seq-length is of models with encoder and decoder"),
        ("--fim-data", "--fim-data is read by Megatron's own entry alone; leave it out"),
        ("--freeze-all-layers", "--freeze-all-layers is ignored by Megatron 0.19.2: the weights"),
        ("--inprocess-restart", "--inprocess-restart is of Megatron's own entry; mlra launch"),
        ("--logits-save-dir x", "--logits-save-dir leaves every loss at 0 in Megatron 0.19.2; "),
        ("--logits-load-dir x", "--logits-load-dir is read by the loss of Megatron's own entry"),
        ("--decoder-num-layers 2", "--decoder-num-layers is of models with encoder and decoder"),
        # Beyond what torch's numbers hold.
        ("--lr 1e300", "--lr is 1e+300; it must be below 3.4e+38"),
        ("--weight-decay 1e39", "--weight-decay is 1e+39; it must be below 3.4e+38"),
        (f"--rotary-base {10**23}", f"--rotary-base is {10**23}; it must be below 2^63"),
        ("--muon-num-ns-steps 101", "--muon-num-ns-steps is 101; it must be at most 100"),
        ("--train-iters 1000000001", "--train-iters is 1000000001; it must be at most 1000000000"),
        ("--eval-iters 1000000001", "--eval-iters is 1000000001; it must be at most 1000000000"),
        (
            "--distributed-timeout-minutes 1000000001",
            "--distributed-timeout-minutes is 1000000001; it must be at most 1000000000",
        ),
        ("--seed 4294967296", "--seed is 4294967296; it must be at most 4294967295"),
        ("--data-seed 4294967296", "--data-seed is 4294967296; it must be at most 4294967295"),
    ],
)
def test_numbers_that_ended_a_run_behind_its_start(words, said):
    assert said in refused(words)


@pytest.mark.parametrize(("name", "value", "said"), BOUNDS)
def test_every_bound_of_the_tables(name, value, said):
    with pytest.raises(ValueError, match=rf"{re.escape(said)}$"):
        value_checks.check_values(Namespace(**{name: value}))


def test_every_name_of_the_tables_is_one_of_a_flag():
    known = {action.dest for action in all_flags._parser()._actions}
    assert {name for name, *_ in BOUNDS} <= known


@pytest.mark.parametrize(
    ("words", "said"),
    [
        # A traceback.
        (
            "--valid-data-path x",
            "names data by --mock-data and by --valid-data-path; leave one out",
        ),
        ("--config-logger-dir x", "--config-logger-dir fails in Megatron 0.19.2; leave it out"),
        ("--moe-routing-trace-path file", "--moe-routing-trace-path file cannot be written"),
        (
            "--nccl-communicator-config-path gone",
            "--nccl-communicator-config-path gone: No such file or directory",
        ),
        (
            "--result-rejected-tracker-filename file/x/log",
            "--result-rejected-tracker-filename file/x/log cannot be written: file is not a folder",
        ),
    ],
)
def test_paths_that_cannot_be_used(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=re.escape(said)):
        early_checks.check(["--config", "debug", "--mock-data", *words.split()])


def test_a_huge_number_of_expert_ranks_is_refused_at_once():
    args = Namespace(num_experts=4, expert_model_parallel_size=10**12, use_checkpoint_args=False)
    args.moe_router_num_groups = None
    with pytest.raises(ValueError, match=r"1000000000000 does not divide --num-experts 4; use 4$"):
        check_experts(args)
