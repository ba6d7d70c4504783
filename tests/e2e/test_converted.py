"""Checkpoints of a TP2 x PP2 run, converted, and what the entry makes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_mlra.checkpoint.cli import main
from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.evaluation import cli as evaluation
from megatron_mlra.inference import cli as generate
from support.runs import Run

LAYOUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
LAYOUT += ["--use-distributed-optimizer"]
# No padding: rows that pad a vocabulary are part of the trainer's loss.
VOCABULARY = ["--vocab-size", "272"]


def convert(*argv: object) -> None:
    assert main([*map(str, argv), "--quiet"]) == 0


def validation(run: Run) -> list[str]:
    """Validation losses in the order they were printed."""
    assert run.code == 0, run.err
    return re.findall(r"validation at step \d+: lm loss ([\d.]+)", run.out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, entry, preset) -> Run:
    """Four of eight steps on four ranks."""
    folder = tmp_path_factory.mktemp("trained")
    argv = ["--config", preset, *VOCABULARY, *LAYOUT, "--save", folder / "save"]
    run = entry.run(folder, *argv, "--exit-interval", 4, ranks=4)
    assert run.code == 0, run.err
    return run


@pytest.fixture(scope="module")
def byte_level(trained, tmp_path_factory) -> Path:
    """The trained weights without the rows that no byte has: what `--vocab-size 257` saves."""
    folder = tmp_path_factory.mktemp("bytes") / "megatron"
    write_megatron(open_checkpoint(trained.folder / "save", 257), folder, progress=False)
    return folder


def first_validation(entry, preset, folder: Path, load: Path, *more: object, ranks: int = 0) -> str:
    """The validation loss with the weights of `load`, before a step."""
    argv = ["--config", preset, *VOCABULARY, "--load", load, "--eval-at-start", *more]
    run = entry.run(folder, *argv, "--exit-interval", 1, ranks=ranks)
    assert "validation at step 0" in run.out, run.err
    return validation(run)[0]


def test_converted_weights_have_the_same_loss(trained, entry, preset, tmp_path):
    save = trained.folder / "save"
    convert("export-official", save, tmp_path / "official")
    convert("import-official", tmp_path / "official", tmp_path / "back", "--padded-vocab-size", 272)
    convert("reshard", save, tmp_path / "weights", "--weights-only")
    expected = validation(trained)[0]
    for name in ("back", "weights"):
        run = tmp_path / f"run-{name}"
        assert first_validation(entry, preset, run, tmp_path / name) == expected
    # The converted folder too loads at any layout.
    argv = (*LAYOUT[:4], "--finetune")
    run = tmp_path / "run-parallel"
    assert first_validation(entry, preset, run, tmp_path / "back", *argv, ranks=4) == expected


def test_every_kind_of_folder_writes_and_scores_alike(byte_level, tmp_path):
    folders = {"megatron": byte_level, "official": tmp_path / "official", "hf": tmp_path / "hf"}
    folders["back"] = tmp_path / "back"
    convert("export-official", byte_level, folders["official"])
    convert("export-hf", folders["official"], folders["hf"], "--tokenizer", "byte")
    convert("import-hf", folders["hf"], folders["back"])
    text = tmp_path / "text.txt"
    text.write_text("def main(argv: list[str]) -> int:\n" * 3)
    tokens, scores = {}, {}
    for kind, folder in folders.items():
        out = tmp_path / f"{kind}.json"
        argv = ["--prompt", "def ", "--prompt", "", "--max-new-tokens", "12", "--temperature", "1"]
        assert generate.main([str(folder), *argv, "--output", str(out)]) == 0
        tokens[kind] = [json.loads(line)["tokens"] for line in out.read_text().splitlines()]
        assert evaluation.main([str(folder), "--text", str(text), "--json", str(out)]) == 0
        scores[kind] = json.loads(out.read_text())["text"][str(text)]
    assert len(set(tokens["megatron"][0])) > 1
    for kind in folders:
        assert tokens[kind] == tokens["megatron"] and scores[kind] == scores["megatron"], kind


def test_resharded_run_continues(trained, entry, preset, tmp_path):
    save = trained.folder / "save"
    convert("reshard", save, tmp_path / "resharded", "--files", 3)
    assert len(list((tmp_path / "resharded" / "iter_0000004").glob("*.distcp"))) == 3
    losses = []
    for load in (save, tmp_path / "resharded"):
        argv = ["--config", preset, *VOCABULARY, "--load", load, "--use-distributed-optimizer"]
        run = entry.run(tmp_path / f"run-{load.name}", *argv)
        assert run.code == 0, run.err
        losses.append(run.losses)
    assert losses[0] == losses[1] and sorted(losses[0]) == [5, 6, 7, 8]


def test_padded_vocabulary_is_cut(trained):
    save = trained.folder / "save"
    whole, cut = open_checkpoint(save), open_checkpoint(save, vocab_size=257)
    name = "embedding.word_embeddings.weight"
    assert whole.tensor(name).shape == (272, 64)
    assert torch.equal(cut.tensor(name), whole.tensor(name)[:257])
    assert cut.description.variant == "MLRA-4"
