"""Multi-token prediction from the entry: its loss in the log, another layout, and conversion."""

from __future__ import annotations

import math
import re
import shutil

import pytest

from megatron_mlra.checkpoint.cli import main as convert
from megatron_mlra.checkpoint.megatron.torch_dist import TorchDistFolder

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


def test_its_loss_stands_in_the_log_and_falls(begun):
    found = re.findall(r"step \d/8 \| lm loss [\d.]+ \| mtp_1 loss ([\d.]+) \| grad", begun.out)
    losses = [float(loss) for loss in found]
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


def test_an_export_is_the_model_without_it(begun, tmp_path, capsys):
    save = str(begun.folder / "save")
    assert convert(["inspect", save]) == 0
    said = "multi-token prediction (1 tokens ahead)"
    assert f"besides: {said}, which conversions leave out" in capsys.readouterr().out
    assert convert(["export-hf", save, str(tmp_path / "exported"), "--quiet"]) == 0
    assert f"{said} is left out" in capsys.readouterr().out
    compared = ["verify", save, str(tmp_path / "exported"), "--quiet", "--tokenizer", "byte"]
    assert convert(compared) == 0
