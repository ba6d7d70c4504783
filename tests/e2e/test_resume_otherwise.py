"""A run that goes on otherwise than it began: refused beforehand with the fix, or as asked."""

from __future__ import annotations

import re
import shutil

import pytest

from support.runs import scalars, tokenize

OVERRIDE = "--override-opt-param-scheduler"


@pytest.fixture
def resume(entry, preset, whole, tmp_path):
    """Go on from step 4 of 8 of the whole run, without its folder's step 8."""
    save = tmp_path / "save"
    shutil.copytree(whole.folder / "save/iter_0000004", save / "iter_0000004")
    (save / "latest_checkpointed_iteration.txt").write_text("4")

    def run(*argv, **job):
        return entry.run(tmp_path, "--config", preset, "--load", save, *argv, **job)

    return run


REFUSED = {
    "precision": (
        ["--bf16"],
        "has an optimizer of float32 weights, and this run trains in bf16; t",
    ),
    "optimizer": (["--optimizer", "sgd"], "was saved with --optimizer adam, and this run has sgd;"),
    "rate": (["--lr", "1e-3"], "another schedule: --lr is 0.002 there, 0.001 here; keep the check"),
    "minimum": (["--min-lr", "1e-4"], "--min-lr is 0.0002 there, 0.0001 here; keep the checkpoint"),
    "length": (
        ["--train-iters", 16],
        "the decay (--lr-decay-iters, else --train-iters) is 32 samples there, 64 here; the whole",
    ),
    "decay": (["--weight-decay", "0.2"], "--start-weight-decay is 0.1 there, 0.2 here; --end-weig"),
    "batch": (
        ["--global-batch-size", 8],
        "is 32 samples there, 64 here; --global-batch-size is 4 there, 8 here; keep the checkpoint",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_differs_is_named_beforehand(resume, case):
    argv, said = REFUSED[case]
    run = resume(*argv)
    assert run.code == 2 and run.out == "" and run.err.count("\n") == 1, run.err
    assert said in run.err


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_moments_that_each_rank_saves_go_on(entry, preset, tmp_path, optimizer):
    """`dist_ckpt_optim_fully_reshardable: false`: the optimizer's own parts, nothing gathered."""
    save, own = tmp_path / "whole/save", tmp_path / "own.yaml"
    own.write_text(f"base: {preset}\ndist_ckpt_optim_fully_reshardable: false\n")
    argv = ("--config", own, "--bf16", "--use-distributed-optimizer", "--optimizer", optimizer)
    argv += ("--log-interval", 1)
    whole = entry.run(tmp_path / "whole", *argv, "--save", save, ranks=2)
    assert whole.code == 0, whole.err
    shutil.rmtree(save / "iter_0000008")
    (save / "latest_checkpointed_iteration.txt").write_text("4")
    for ranks in (2, 1):
        run = entry.run(tmp_path / f"on-{ranks}", *argv, "--load", save, ranks=ranks)
        assert run.code == 0, run.err
        for step in (5, 6, 7, 8):
            assert run.losses[step] == pytest.approx(whole.losses[step], abs=2e-3), step
    argv += ("--load", save, "--tensor-model-parallel-size", 2)
    other = entry.run(tmp_path / "other", *argv, ranks=2)
    assert other.code == 2 and other.err.count("\n") == 1, other.err
    said = "--tensor-model-parallel-size is 1 there, 2 here; use the same, or add --no-load-optim"
    assert said in other.err


def test_a_checkpoint_without_an_optimizer(entry, preset, tmp_path):
    save = tmp_path / "save"
    argv = ("--config", preset, "--save", save, "--load", save)
    first = entry.run(tmp_path, *argv, "--no-save-optim", "--exit-interval", 4)
    assert first.code == 0, first.err
    run = entry.run(tmp_path, *argv)
    assert run.code == 2 and "iter_0000004 holds no optimizer (saved with --no-save-opt" in run.err
    assert "add --no-load-optim to go on with fresh moments, or --finetune for a new run" in run.err
    run = entry.run(tmp_path, *argv, "--no-load-optim")
    assert run.code == 0 and "continuing after step 4 of" in run.out, run.err


@pytest.mark.parametrize(
    "layout", [[], ["--use-distributed-optimizer"]], ids=["whole", "distributed"]
)
def test_another_rate_keeps_the_moments(entry, preset, tmp_path, layout):
    save = tmp_path / "save"
    argv = ("--config", preset, "--save", save, "--load", save, *layout, "--log-interval", 1)
    assert entry.run(tmp_path, *argv, "--exit-interval", 4).code == 0
    shutil.copytree(save, tmp_path / "copy")
    same = entry.run(tmp_path, *argv, "--exit-interval", 5)
    assert same.code == 0, same.err
    other = entry.run(
        tmp_path / "other",
        *("--config", preset, "--load", tmp_path / "copy", *layout, "--log-interval", 1),
        *(OVERRIDE, "--lr", "1e-3", "--min-lr", "1e-4", "--exit-interval", 5),
    )
    assert other.code == 0, other.err

    def line(run):
        return next(line for line in run.out.splitlines() if line.startswith("step 5/8"))

    rates = [float(re.search(r"lr (\S+)", line(run))[1]) for run in (same, other)]
    assert rates[1] == pytest.approx(rates[0] / 2, rel=1e-2)
    losses = [re.search(r"lm loss (\S+)", line(run))[1] for run in (same, other)]
    assert losses[0] == losses[1], "the same weights and the same samples"


@pytest.mark.parametrize(
    "layout", [[], ["--use-distributed-optimizer"]], ids=["whole", "distributed"]
)
def test_the_checkpoints_schedule_is_kept_to_the_digit(entry, preset, tmp_path, layout):
    argv = ("--config", preset, *layout, "--log-interval", 1, "--weight-decay", 20)
    whole = entry.run(tmp_path / "whole", *argv, "--save", tmp_path / "whole/save")
    assert whole.code == 0, whole.err
    save = tmp_path / "whole/save"
    shutil.rmtree(save / "iter_0000008")
    (save / "latest_checkpointed_iteration.txt").write_text("4")
    other = ("--lr", "1e-3", "--min-lr", "1e-4", "--weight-decay", 0, "--lr-warmup-iters", 1)
    run = entry.run(
        tmp_path / "on", *argv, "--load", save, *other, "--use-checkpoint-opt-param-scheduler"
    )
    assert run.code == 0, run.err
    assert run.losses == {step: whole.losses[step] for step in (5, 6, 7, 8)}


@pytest.mark.parametrize(
    "flags",
    [
        ["sgd", "--lr", 0.1],
        ["sgd", "--lr", 0.1, "--bf16"],
        ["lion", "--bf16", "--use-distributed-optimizer"],
    ],
)
def test_momentum_of_other_optimizers_goes_on(entry, preset, tmp_path, flags):
    argv = ("--config", preset, "--log-interval", 1, "--optimizer", *flags)
    save = tmp_path / "whole/save"
    whole = entry.run(tmp_path / "whole", *argv, "--save", save)
    assert whole.code == 0, whole.err
    shutil.rmtree(save / "iter_0000008")
    (save / "latest_checkpointed_iteration.txt").write_text("4")
    run = entry.run(tmp_path / "on", *argv, "--load", save)
    assert run.code == 0, run.err
    assert run.losses == {step: whole.losses[step] for step in (5, 6, 7, 8)}


def test_dropout_is_the_same_however_often_a_run_stops_and_evaluates(entry, preset, tmp_path):
    argv = ("--config", preset, "--hidden-dropout", 0.1, "--attention-dropout", 0.1)
    argv += ("--log-interval", 1)
    plain = entry.run(tmp_path / "plain", *argv, "--eval-iters", 0)
    assert plain.code == 0, plain.err
    save = tmp_path / "save"
    part = (*argv, "--save", save, "--load", save, "--eval-interval")
    begun = entry.run(tmp_path / "begun", *part, 3, "--exit-interval", 4, "--eval-at-start")
    assert begun.code == 0, begun.err
    losses = scalars(save, "lm loss")
    assert losses == {step: plain.losses[step] for step in (1, 2, 3, 4)}
    resumed = entry.run(tmp_path / "resumed", *part, 1)
    assert resumed.code == 0, resumed.err
    assert scalars(save, "lm loss") == plain.losses


def test_a_length_that_changes_the_order_of_samples_is_said(resume, whole):
    """The training data are 1,438 samples, and steps take 4."""
    flags = (OVERRIDE, "--exit-interval", 5, "--train-iters")
    run = resume(*flags, 300)
    assert run.code == 0 and "warning" not in run.out, run.err
    assert run.losses[5] == whole.losses[5]
    run = resume(*flags, 600)
    assert run.code == 0, run.err
    assert run.losses[5] != whole.losses[5], "other samples"
    said = (
        "warning: the run was planned for 32 samples and is for 2,400 now, more or fewer passes"
        " over its data, whose order changes with that: some of the 16 samples behind it come"
        " again; start a run with its whole length, and pause it by --exit-interval"
    )
    assert run.out.splitlines().count(said) == 1, run.out


OTHER = {
    "seed": (["--seed", 7], "--seed is 7 (it was 1234)"),
    "data seed": (["--data-seed", 7], "--data-seed is 7 (it was 1234)"),
    "split": (["--split", "50,40,10"], "--split is 50,40,10 (it was 80,10,10)"),
    "data": (["--data-path", "OTHER"], "--data-path is OTHER (it was TEXT)"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_samples_than_before_are_said(resume, whole, case, corpus, tmp_path):
    other = tmp_path / "other"
    if case == "data":
        tokenize(["some other text", "of two documents"] * 400, other)
    flags, said = OTHER[case]
    run = resume(*(other if word == "OTHER" else word for word in flags), "--exit-interval", 5)
    assert run.code == 0, run.err
    assert run.losses[5] != whole.losses[5], "other samples"
    lines = [line for line in run.out.splitlines() if line.startswith("warning")]
    said = said.replace("TEXT", str(corpus)).replace("OTHER", str(other))
    assert len(lines) == 1 and lines[0].startswith(f"warning: {said}: "), lines
    assert ("unless these are the same data" in lines[0]) == (case == "data")
    assert "Some of the 16 that are behind the run may come again, held-out ones too;" in lines[0]
    if case == "seed":
        run = resume(*flags, "--finetune", "--exit-interval", 1)
        assert run.code == 0 and "warning" not in run.out, run.err


def test_the_same_data_in_other_words_are_not_said(resume, whole, corpus):
    flags = ("--split", "8,1,1", "--data-seed", 1234, "--data-path", f"{corpus.parent}/./text")
    run = resume(*flags, "--exit-interval", 5)
    assert run.code == 0 and "warning" not in run.out, run.err
    assert run.losses[5] == whole.losses[5]


def test_a_batch_that_moves_the_end_of_the_schedule_is_said(resume):
    run = resume(OVERRIDE, "--global-batch-size", 8)
    assert run.code == 0, run.err
    said = re.search(
        r"warning: another --global-batch-size than before, and the rate decays by samples: it will"
        r" be (\S+) after the last step, not 0.0002; --lr-decay-iters 6 ends it there",
        run.out,
    )
    assert said, run.out
    last = re.findall(r"step 8/8 .* lr (\S+)", run.out)[-1]
    assert float(last) == pytest.approx(float(said[1]), rel=1e-2)
    again = resume(OVERRIDE, "--global-batch-size", 8, "--lr-decay-iters", 6)
    assert again.code == 0 and "warning" not in again.out
    assert re.findall(r"step 8/8 .* lr (\S+)", again.out) == ["2.00e-04"]


@pytest.mark.parametrize(("batch", "last"), [(2, 12), (8, 6)])
def test_another_batch_trains_on_the_rest_of_the_samples(resume, batch, last):
    """16 of 32 samples are left behind step 4, the last of a batch of 4."""
    length = ("--train-samples", 32, "--lr-warmup-iters", 0, "--lr-warmup-samples", 0)
    run = resume(*length, OVERRIDE, "--global-batch-size", batch, "--micro-batch-size", 2)
    assert run.code == 0 and "warning" not in run.out, run.err
    assert max(run.losses) == last and f"--train-samples 32 is {last}, not " in run.out
    assert re.findall(rf"step {last}/{last} .* lr (\S+)", run.out) == ["2.00e-04"]


def test_a_rising_batch_goes_on_as_if_never_stopped(entry, preset, tmp_path):
    """Steps of 4, 4, 8 and 8 sequences of 32 tokens."""
    argv = ("--config", preset, "--train-samples", 24, "--step-batch-size-schedule", "0:4 256:8")
    argv += ("--lr-warmup-iters", 0, "--lr-warmup-samples", 4)
    whole = entry.run(tmp_path, *argv)
    assert "length: 4 steps of 128 to 256 tokens (4 to 8 sequences of 32)" in whole.out, whole.err
    assert [*whole.losses] == [1, 2, 3, 4]
    argv += ("--save", tmp_path / "save", "--load", tmp_path / "save")
    assert entry.run(tmp_path, *argv, "--exit-interval", 3).code == 0
    run = entry.run(tmp_path, *argv)
    assert "continuing after step 3" in run.out and "note: steps" not in run.out, run.err
    assert run.losses == whole.losses


def test_a_finished_run_leaves_its_last_checkpoint_alone(resume, tmp_path):
    folder = tmp_path / "save/iter_0000004"

    def written():
        return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}

    before = written()
    # 3 does not divide 4: Megatron saves behind the last step, made or not.
    flags = (OVERRIDE, "--save-interval", 3, "--train-iters", 4)
    run = resume("--save", tmp_path / "save", *flags)
    assert run.code == 0 and "step 4 of 4 is the end" in run.out, run.err
    assert "saved step" not in run.out and written() == before


def test_a_rate_behind_for_skipped_steps_is_said(entry, preset, tmp_path):
    """With a loss scale of 2^22 the first steps of fp16 overflow."""
    argv = ("--config", preset, "--fp16", "--initial-loss-scale", 2**22, "--hysteresis", 1)
    argv += ("--save", tmp_path / "save", "--load", tmp_path / "save")
    first = entry.run(tmp_path, *argv, "--exit-interval", 7)
    assert first.code == 0, first.err
    run = entry.run(tmp_path, *argv)
    assert run.code == 0, run.err
    assert "warning: skipped steps (not finite in fp16) do not move the rate's decay: " in run.out
    assert "--global-batch-size than before" not in run.out


def test_a_rate_that_begins_anew_is_said(resume, tmp_path):
    """--no-load-optim leaves out the schedule's state too, and no step was skipped."""
    save = ("--save", tmp_path / "new")
    run = resume("--no-load-optim", "--exit-interval", 6, *save)
    assert run.code == 0 and "skipped steps" not in run.out, run.err
    assert "warning: --no-load-optim begins the rate's schedule anew: it will be " in run.out
    assert "; --lr-decay-iters 4 ends it there" in run.out
    run = resume("--load", tmp_path / "new", *save)
    assert run.code == 0 and "skipped steps" not in run.out, run.err
    assert "warning: the rate's schedule began anew in this run (--no-load-optim): it" in run.out


def test_a_start_with_weights_names_them(resume, tmp_path):
    run = resume("--finetune", "--train-iters", 1)
    assert run.code == 0 and "continuing after" not in run.out, run.err
    assert f"starting at step 0 with the weights of {tmp_path}/save/iter_0000004\n" in run.out


@pytest.mark.parametrize(
    "flags", [["adam"], ["adam", "--use-distributed-optimizer"], ["sgd"]], ids=" ".join
)
def test_a_checkpoint_before_the_first_update_goes_on(entry, preset, tmp_path, flags):
    """fp16 has skipped all steps so far, so the optimizer has no moments yet."""
    argv = ("--config", preset, "--fp16", "--initial-loss-scale", 2**19, "--hysteresis", 1)
    argv += ("--log-interval", 1, "--optimizer", *flags)
    plain = entry.run(tmp_path / "plain", *argv)
    assert plain.code == 0, plain.err
    assert 2 not in plain.losses and 3 in plain.losses, "the first two steps are skipped"
    argv += ("--save", tmp_path / "save", "--load", tmp_path / "save")
    assert entry.run(tmp_path / "begun", *argv, "--exit-interval", 2).code == 0
    resumed = entry.run(tmp_path / "resumed", *argv)
    assert resumed.code == 0, resumed.err
    assert scalars(tmp_path / "save", "lm loss") == plain.losses
