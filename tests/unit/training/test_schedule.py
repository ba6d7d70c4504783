"""Schedules in steps and in samples: a preset's gives way, two on a command line do not mix."""

from __future__ import annotations

import pytest

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
