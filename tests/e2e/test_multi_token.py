"""Multi-token prediction from the entry: its loss in the log, another layout, and conversion."""

from __future__ import annotations

import math
import re
import shutil

import pytest
import torch

from megatron_mlra.checkpoint.cli import main as convert
from megatron_mlra.checkpoint.megatron.torch_dist import TorchDistFolder
from megatron_mlra.inference.cli import main as generate

WEIGHT = r"(?!optimizer).*\.(weight|layer_norm_weight)$"
FLAGS = ("--mtp-num-layers", 1, "--log-interval", 1)


@pytest.fixture(scope="module")
def begun(entry, preset, tmp_path_factory):
    """Eight steps on one rank, saved at the fourth and the last."""
    folder = tmp_path_factory.mktemp("multi_token")
    argv = ("--config", preset, "--save", folder / "save", *FLAGS)
    argv += ("--tensorboard-dir", folder / "tensorboard")
    run = entry.run(folder, *argv)
    assert run.code == 0, run.err
    return run


def mtp_losses(run) -> list[float]:
    """The loss of the first depth in every line of a step."""
    found = re.findall(r"step \d/\d \| lm loss [\d.]+ \| mtp_1 loss ([\d.]+) \| grad", run.out)
    return [float(loss) for loss in found]


def test_its_loss_stands_in_the_log_and_falls(begun):
    losses = mtp_losses(begun)
    assert len(losses) == 8
    assert losses[-1] < losses[0]


def test_every_parameter_is_counted(begun):
    said = re.search(r"training MLRA-4: ([\d,]+) parameters", begun.out)[1]
    stored = TorchDistFolder(begun.folder / "save/iter_0000008").shapes()
    weights = {name: shape for name, shape in stored.items() if re.match(WEIGHT, name)}
    assert any(name.startswith("mtp.layers.0.") for name in weights)
    assert sum(map(math.prod, weights.values())) == int(said.replace(",", ""))


def test_a_checkpoint_goes_on_in_another_layout(begun, entry, preset, tmp_path):
    save = tmp_path / "save"
    shutil.copytree(begun.folder / "save/iter_0000004", save / "iter_0000004")
    (save / "latest_checkpointed_iteration.txt").write_text("4")
    argv = ("--config", preset, "--load", save, *FLAGS, "--pipeline-model-parallel-size", 2)
    run = entry.run(tmp_path, *argv, ranks=2)
    assert run.code == 0, run.err
    for step in (5, 6, 7, 8):
        assert run.losses[step] == pytest.approx(begun.losses[step], rel=2e-4), step
    other = entry.run(tmp_path / "other", "--config", preset, "--load", save)
    assert other.code == 2 and other.err.count("\n") == 1
    assert "mtp_num_layers" in other.err


@pytest.fixture(scope="module")
def exported(begun):
    """The last checkpoint as a Hugging Face folder."""
    folder = begun.folder / "exported"
    assert convert(["export-hf", str(begun.folder / "save"), str(folder), "--quiet"]) == 0
    return folder


def stored(folder) -> dict[str, torch.Tensor]:
    """The weights of a Megatron folder, by Megatron's own names."""
    files = TorchDistFolder(folder)
    return {name: files.tensor(name) for name in files.shapes() if re.match(WEIGHT, name)}


def test_an_export_goes_back_into_training(begun, exported, entry, preset, tmp_path, capsys):
    save, back = str(begun.folder / "save"), tmp_path / "back"
    assert convert(["inspect", str(exported)]) == 0
    said = "besides: multi-token prediction (1 token ahead): 1 layer, 55,200 parameters"
    assert said in capsys.readouterr().out
    assert convert(["verify", save, str(exported), "--quiet", "--tokenizer", "byte"]) == 0
    argv = [str(exported), str(back), "--padded-vocab-size", "272", "--quiet"]
    assert convert(["import-hf", *argv]) == 0
    before, after = stored(begun.folder / "save/iter_0000008"), stored(back / "release")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        rows = 257 if weight.size(0) == 272 else None  # a vocabulary's padding comes back as zeros
        assert torch.equal(after[name][:rows], weight[:rows]), name
    run = entry.run(tmp_path, "--config", preset, "--load", back, *FLAGS, "--train-iters", 1)
    assert run.code == 0, run.err
    assert mtp_losses(run)[0] < mtp_losses(begun)[0] - 0.3


def test_layers_are_added_to_weights_without_them(begun, entry, preset, tmp_path, capsys):
    official, plain = tmp_path / "official", tmp_path / "plain"
    assert convert(["export-official", str(begun.folder / "save"), str(official), "--quiet"]) == 0
    assert "multi-token prediction (1 token ahead) is left out" in capsys.readouterr().out
    argv = [str(official), str(plain), "--padded-vocab-size", "272", "--quiet"]
    assert convert(["import-official", *argv]) == 0
    argv = ("--config", preset, "--load", plain, "--save", tmp_path / "save", *FLAGS)
    refused = entry.run(tmp_path / "refused", *argv)
    assert refused.code == 2 and refused.err.count("\n") == 1
    said = "mtp_num_layers is None there, 1 here (--finetune begins a new run with these weights"
    assert said in refused.err
    argv += ("--finetune", "--train-iters", 2, "--eval-at-start", "--eval-interval", 2)
    run = entry.run(tmp_path / "run", *argv)
    assert run.code == 0, run.err
    said = "1 layer of multi-token prediction that it has not, newly initialised, as asked"
    assert run.out.count(said) == 1 and "load_return" not in run.out
    # The decoder is the one that was loaded (without trained rows of padding), and the new layer
    # knows nothing yet.
    of_validation = r"validation at step \d: lm loss ([\d.]+)"
    trained, loaded = (
        re.findall(of_validation, begun.out)[-1],
        re.findall(of_validation, run.out)[0],
    )
    assert float(loaded) == pytest.approx(float(trained), abs=0.05)
    assert mtp_losses(run)[0] > mtp_losses(begun)[-1] + 0.3
    layers = stored(tmp_path / "save/iter_0000002")
    assert any(name.startswith("mtp.layers.0.") for name in layers)


def test_guesses_leave_the_output_as_it_is(begun, exported, tmp_path, capsys):
    save = str(begun.folder / "save")
    argv = [save, "--max-new-tokens", "24", "--ignore-eod", "--prompt", "def one", "--prompt", "x"]
    assert generate([*argv, "--output", str(tmp_path / "plain.jsonl")]) == 0
    capsys.readouterr()
    assert generate([*argv, "--speculate", "--output", str(tmp_path / "guessed.jsonl")]) == 0
    assert re.search(r"\d+ of \d+ guesses right \(\d+%\)\n", capsys.readouterr().err)
    assert (tmp_path / "guessed.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    argv = [str(exported), *argv[1:], "--output", str(tmp_path / "exported.jsonl")]
    assert generate([*argv, "--speculate"]) == 0
    assert (tmp_path / "exported.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    official = str(tmp_path / "official")
    assert convert(["export-official", save, official, "--quiet"]) == 0
    capsys.readouterr()
    assert generate([official, *argv[1:], "--speculate"]) == 2
    assert "has none; leave it out, or train with --mtp-num-layers 1" in capsys.readouterr().err
