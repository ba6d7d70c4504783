"""Schedules in steps and in samples: a preset's gives way, two on a command line do not mix."""

from __future__ import annotations

import pytest
from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron_mlra.training import batch_schedule
from megatron_mlra.training.arguments import parse, validate

BASE = ["--config", "debug", "--mock-data"]  # 320 steps of 8, 20 of warm-up


def schedule(*argv: str) -> dict:
    args = parse([*BASE, *argv])
    validate(args)
    names = ("train_iters", "train_samples", "lr_warmup_iters", "lr_warmup_samples")
    return {name: getattr(args, name) for name in names if getattr(args, name)}


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        ([], {"train_iters": 320, "lr_warmup_iters": 20}),
        (["--train-samples", "800"], {"train_samples": 800, "lr_warmup_samples": 160}),
        (
            ["--train-samples", "800", "--lr-warmup-samples", "8"],
            {"train_samples": 800, "lr_warmup_samples": 8},
        ),
        (["--train-samples", "800", "--lr-warmup-fraction", "0.1"], {"train_samples": 800}),
        (["--lr-warmup-fraction", "0.1"], {"train_iters": 320}),
        # Its warm-up would be all of the run.
        (["--train-iters", "20"], {"train_iters": 20, "lr_warmup_iters": 2}),
        (["--train-samples", "160"], {"train_samples": 160, "lr_warmup_samples": 16}),
        (["--train-iters", "6"], {"train_iters": 6}),
    ],
)
def test_a_presets_schedule_gives_way(argv, found):
    assert schedule(*argv) == found


def test_a_presets_samples_give_way_to_steps(tmp_path):
    (tmp_path / "p.yaml").write_text(
        "base: debug\ntrain_iters: null\nlr_warmup_iters: 0\n"
        "train_samples: 800\nlr_warmup_samples: 80\n"
    )
    preset = ["--config", str(tmp_path / "p.yaml")]
    assert schedule(*preset) == {"train_samples": 800, "lr_warmup_samples": 80}
    found = schedule(*preset, "--train-iters", "40")
    assert found == {"train_iters": 40, "lr_warmup_iters": 10}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--train-samples", "16", "--train-iters", "2"],
            "--train-iters 2 and --train-samples 16 exclude each other; give one",
        ),
        (
            ["--train-samples", "16", "--lr-warmup-iters", "1"],
            "--lr-warmup-iters 1 counts steps and --train-samples samples; use"
            " --lr-warmup-samples 8",
        ),
        (
            ["--train-samples", "16", "--lr-decay-iters", "2"],
            "--lr-decay-iters 2 counts steps and --train-samples samples; use"
            " --lr-decay-samples 16",
        ),
        (
            ["--lr-warmup-samples", "12"],
            "--lr-warmup-samples 12 counts samples and --train-iters steps; use"
            " --lr-warmup-iters 2",
        ),
        (
            ["--lr-warmup-fraction", "0.1", "--lr-warmup-iters", "3"],
            "--lr-warmup-fraction 0.1 and --lr-warmup-iters 3 exclude each other; give one",
        ),
    ],
)
def test_two_ways_to_count_are_one_line(argv, said):
    with pytest.raises(ValueError) as error:
        schedule(*argv)
    assert str(error.value) == said


RISING = ["--step-batch-size-schedule", "0:8 4096:16"]  # 256 tokens a sequence


def test_a_schedule_of_batch_sizes_replaces_a_presets_batch_size():
    args = parse([*BASE, "--train-samples", "48", *RISING])
    assert args.eval_global_batch_size == 8
    validate(args)
    assert batch_schedule.steps(args) == 4  # of 8, 8, 16 and 16 samples
    assert batch_schedule.sizes(args) == (8, 16)


@pytest.mark.parametrize(("seen", "left"), [(0, 4), (16, 2), (32, 1), (40, 0), (48, 0), (64, 0)])
def test_steps_left_of_a_schedule(seen, left):
    args = parse([*BASE, "--train-samples", "48", *RISING])
    assert batch_schedule.steps_left(args, seen) == left


def test_a_batch_size_replaces_a_presets_schedule(tmp_path):
    (tmp_path / "p.yaml").write_text(f"base: debug\nstep_batch_size_schedule: {RISING[1]}\n")
    preset = ["--config", str(tmp_path / "p.yaml"), "--mock-data"]
    args = parse([*preset, "--train-samples", "48"])
    assert args.global_batch_size is None and args.step_batch_size_schedule == RISING[1]
    args = parse([*preset, "--global-batch-size", "16"])
    assert args.global_batch_size == 16 and args.step_batch_size_schedule is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0:4 1K:8,2k:16", [(0, 4), (10, 8), (20, 16)]),
        ("5B:1K 0:7", [(0, 7), (50_000_000, 1000)]),
        ("1:4", [(0, 4)]),
    ],
)
def test_schedules_of_batch_sizes_are_read_as_by_megatron(text, found):
    theirs = StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 1, text, 100)
    assert batch_schedule.stages(text, 100) == theirs.schedule == found


@pytest.mark.parametrize(
    "text", ["", "8", "0:", "0:0", ":8", "0:x", "-1:8", "0:inf", "0:nan", "0:8 9:16"]
)
def test_a_schedule_of_batch_sizes_that_is_none_is_one_line(text):
    with pytest.raises(ValueError, match=r"--step-batch-size-schedule.* TOKENS:SEQUENCES") as error:
        batch_schedule.stages(text, 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            RISING,
            "--step-batch-size-schedule needs the run's length in samples, by which its rates"
            " change; use --train-samples 5104 for 320 steps",
        ),
        (
            ["--train-samples", "40", *RISING],
            "--train-samples 40 ends within a step of --step-batch-size-schedule; use 48",
        ),
        (
            ["--train-samples", "48", RISING[0], "0:8 4096:12"],
            "--step-batch-size-schedule: 12 does not divide into micro-batches of 8 on 1"
            " data-parallel ranks; use 16, or another --micro-batch-size",
        ),
        (
            ["--train-samples", "48", *RISING, "--global-batch-size", "8"],
            "--global-batch-size 8 and --step-batch-size-schedule '0:8 4096:16' exclude each"
            " other; give one",
        ),
        (
            ["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "301"],
            "--lr-wsd-decay-iters 301 would begin before the warm-up ends: 300 of the schedule's"
            " 320 are left behind it; use at most 300",
        ),
        (
            [
                "--lr-decay-style",
                "WSD",
                "--lr-wsd-decay-iters",
                "301",
                "--lr-warmup-fraction",
                ".1",
            ],
            "--lr-wsd-decay-iters 301 would begin before the warm-up ends: 288 of the schedule's"
            " 320 are left behind it; use at most 288",
        ),
        (
            ["--lr-warmup-init", "1"],
            "--lr-warmup-init 1 is above --lr 0.002; use at most --lr",
        ),
        (
            ["--decoupled-min-lr", "1e-5"],
            "--decoupled-min-lr 1e-05 has no effect without --decoupled-lr; add it",
        ),
        (
            ["--decoupled-lr", "1e-4", "--decoupled-min-lr", "1e-3"],
            "--decoupled-min-lr 0.001 is above --decoupled-lr 0.0001, so that the rate would rise;"
            " use --decoupled-min-lr 1e-05",
        ),
        (
            ["--decoupled-lr", "1e-6"],
            "--min-lr 0.0001 is above --decoupled-lr 1e-06, so that the rate would rise; use"
            " --decoupled-min-lr 1e-07",
        ),
    ],
)
def test_schedules_that_cannot_be_are_one_line(argv, said):
    with pytest.raises(ValueError) as error:
        parse([*BASE, *argv])
    assert str(error.value) == said


def test_without_a_global_batch_a_step_is_a_micro_batch_of_every_replica(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    (tmp_path / "p.yaml").write_text("base: debug\nglobal_batch_size: null\nmicro_batch_size: 2\n")
    argv = ["--config", str(tmp_path / "p.yaml"), "--mock-data", "--context-parallel-size", "2"]
    args = parse([*argv, "--train-samples", "800"])  # 4 replicas, 20 steps of warm-up
    assert args.lr_warmup_samples == 20 * 2 * 4
    said = "--lr-warmup-iters 3 counts steps and .* samples; use --lr-warmup-samples 24"
    with pytest.raises(ValueError, match=said):
        parse([*argv, "--train-samples", "800", "--lr-warmup-iters", "3"])
