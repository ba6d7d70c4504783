"""What the flags of attention logits refuse, and what Megatron's validation sees of them."""

from __future__ import annotations

import math
from argparse import Namespace

import pytest

from megatron_mlra.training import logits
from megatron_mlra.training.arguments import parse, validate
from support import CONFIGS

DEBUG = str(CONFIGS / "debug.yaml")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--qk-clip-threshold 50", "--qk-clip-threshold 50 has no effect without --qk-clip; add"),
        ("--qk-clip --qk-clip-alpha 1", "--qk-clip-alpha is 1; use a share between 0 and 1"),
        ("--qk-clip --qk-clip-threshold 0", "--qk-clip-threshold is 0; use e.g. 100"),
        ("--qk-clip --attention gqa", "gqa needs Transformer Engine's core"),
        ("--log-max-attention-logit --attention gqa", "--log-max-attention-logit with --attention"),
        ("--query-head-norm --attention gqa", "--attention is gqa; use --qk-layernorm"),
        ("--query-head-norm --attention mfa", "--attention is mfa; leave it out"),
        ("--qk-clip --attention mfa", "--qk-clip with --attention mfa: queries or keys of its he"),
        (
            "--qk-clip --use-distributed-optimizer --use-precision-aware-optimizer",
            "--use-precision-aware-optimizer keeps weights within the optimizer, which --qk-clip",
        ),
        ("--qk-clip --optimizer-cpu-offload", "--optimizer-cpu-offload keeps weights in host mem"),
        ("--qk-clip --use-megatron-fsdp", "--use-megatron-fsdp cuts weights within layers"),
        (
            "--log-max-attention-logit --cuda-graph-impl local",
            "--cuda-graph-impl local replays launches, and --log-max-attention-logit has each step",
        ),
    ],
)
def test_what_cannot_work_is_refused(argv, said):
    with pytest.raises(ValueError) as refused:
        parse(["--config", DEBUG, *argv.split()])
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "--qk-clip with --attention gqa needs 16-bit weights; add --bf16"),
        ({"bf16": True, "use_distributed_optimizer": True}, "takes the parts of --use-distributed"),
    ],
)
def test_what_megatrons_own_cannot(given, said):
    args = parse(["--config", DEBUG, "--attention", "gqa", "--group-query-attention"])
    te = {"qk_clip": True, "transformer_impl": "transformer_engine"}
    with pytest.raises(ValueError, match=said):
        logits.check(Namespace(**vars(args) | te | given))
    logits.check(Namespace(**vars(args) | te | {"bf16": True}))


def test_transformer_engine_is_not_asked_for():
    flags = ["--qk-clip", "--log-max-attention-logit", "--query-head-norm", "--mock-data"]
    args = parse(["--config", DEBUG, *flags])
    args.rank, args.world_size = 0, 1
    config = validate(args)
    assert args.qk_clip and args.log_max_attention_logit
    assert config.qk_clip and config.qk_clip_threshold == 100
    assert config.query_head_norm


def test_lines_and_points():
    watch = logits.LogitWatch(Namespace())
    assert watch.said() == [] and watch.points() == {}
    watch.largest, watch.clipped = [1.0, 123.44, -3.0], 2
    assert watch.said() == ["max logit 123. (layer 2)", "2 heads clipped"]
    assert watch.said() == ["max logit 123. (layer 2)"]
    watch.clipped = 1
    assert watch.said()[1] == "1 head clipped"
    names = [f"max_attention_logit/layer_{i}" for i in (1, 2, 3)]
    assert watch.points() == {"max_attention_logit": 123.44} | dict(
        zip(names, watch.largest, strict=True)
    )
    watch.largest = [3.0, math.nan]
    assert watch.said() == ["max logit nan (layer 2)"]


def test_a_layer_that_does_for_all_depths_is_one():
    """A place for each depth would stay -inf in the curves."""
    for depths, repeated, layers in (
        (None, False, 4),
        (2, False, 6),
        (2, True, 5),
        (None, True, 4),
    ):
        config = Namespace(num_layers=4, mtp_num_layers=depths, mtp_use_repeated_layer=repeated)
        assert logits.measured_layers(config) == layers
