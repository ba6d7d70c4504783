"""Muon from the entry: what it prints, and a checkpoint of it on other layouts."""

from __future__ import annotations

import shutil

import pytest

MUON = ("--optimizer", "muon", "--muon-fp32-matmul-prec", "high", "--log-interval", 1)


DISTRIBUTED = "--use-distributed-optimizer"


@pytest.fixture(scope="module")
def begun(entry, preset, tmp_path_factory):
    """Eight steps on one rank, saved at the fourth."""
    folder = tmp_path_factory.mktemp("muon")
    argv = (*("--config", preset, "--save", folder / "save"), *MUON, "--verbose-optimizer")
    run = entry.run(folder, *argv)
    assert run.code == 0, run.err
    return run


def test_what_goes_where_is_printed_when_asked(begun):
    assert "muon: 16 of [16 x 16], a branch's and head's key; 16 of [16 x 16], its v" in begun.out
    assert "embedding.word_embeddings.weight" in begun.out
    assert begun.out.index("optimizer muon, weights of this rank:") < begun.out.index("step 1/8")


@pytest.mark.parametrize(
    "layout",
    [
        ("--tensor-model-parallel-size", 2, "--latent-tp-layout", "latent"),
        ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
    ],
    ids=["latent", "head"],
)
def test_a_checkpoint_goes_on_in_another_layout(begun, entry, preset, tmp_path, layout):
    save = tmp_path / "save"
    shutil.copytree(begun.folder / "save/iter_0000004", save / "iter_0000004")
    (save / "latest_checkpointed_iteration.txt").write_text("4")
    argv = ("--config", preset, "--load", save, "--save", save, *MUON, *layout)
    run = entry.run(tmp_path, *argv, ranks=2)
    assert run.code == 0, run.err
    assert "continuing after step 4 of" in run.out
    expected = begun.losses
    assert run.losses.keys() >= {5, 6, 7, 8}
    for step in (5, 6, 7, 8):
        assert run.losses[step] == pytest.approx(expected[step], rel=2e-4), step


def test_the_distributed_optimizer_trains_alike_and_goes_on(entry, preset, tmp_path):
    save = tmp_path / "save"
    argv = ("--config", preset, *MUON, "--bf16")
    plain = entry.run(tmp_path / "plain", *argv, ranks=2)
    assert plain.code == 0, plain.err
    argv += ("--load", save, "--save", save)
    first = entry.run(tmp_path, *argv, DISTRIBUTED, "--exit-interval", 4, ranks=2)
    assert first.code == 0, first.err
    other = entry.run(tmp_path / "other", *argv, ranks=2)
    assert other.code == 2 and other.err.count("\n") == 1
    assert "was saved with --use-distributed-optimizer True, and this run has False" in other.err
    run = entry.run(tmp_path, *argv, DISTRIBUTED, ranks=2)
    assert run.code == 0, run.err
    assert plain.losses.keys() == run.losses.keys()
    for step, loss in plain.losses.items():
        assert run.losses[step] == pytest.approx(loss, rel=2e-3), step


def test_what_muon_leaves_may_go_to_lion(entry, preset, tmp_path):
    save = tmp_path / "save"
    argv = (*("--config", preset, "--load", save, "--save", save), *MUON)
    lion = ("--muon-scalar-optimizer", "lion")
    run = entry.run(tmp_path, *argv, *lion, "--exit-interval", 4, "--verbose-optimizer")
    assert run.code == 0, run.err
    (norm,) = (line for line in run.out.splitlines() if ".kv_norm.weight" in line)
    assert norm.split()[2] == "lion"
    other = entry.run(tmp_path / "other", *argv)
    assert other.code == 2 and other.err.count("\n") == 1
    said = "saved with --muon-scalar-optimizer lion, and this run has adam; use the same, or add"
    assert said in other.err
    assert entry.run(tmp_path, *argv, *lion).code == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ("--optimizer", "soap"),
            "--optimizer soap takes each weight as one matrix",
        ),
        (("--optimizer", "muon", DISTRIBUTED), "copies of bf16 weights, and nothing else; add --b"),
        (("--optimizer", "dist_muon"), "bf16 weights; add --bf16, or use --optimizer muon"),
        (("--optimizer", "muon", "--fp16"), "--optimizer muon has no loss scaling; use --bf16"),
    ],
)
def test_what_cannot_work_is_refused(entry, preset, tmp_path, argv, said):
    run = entry.run(tmp_path, "--config", preset, *argv)
    assert run.code == 2 and run.err.count("\n") == 1 and said in run.err
