"""A preset is found by its name from any folder, or by its path."""

from __future__ import annotations

import re

import pytest

from megatron_mlra.description.presets import (
    FOLDER,
    find_preset,
    preset_chain,
    preset_list,
    preset_name,
    preset_names,
    preset_values,
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_names_are_found_from_any_folder():
    assert "mlra4_2.9b" in preset_names() and "paper_recipe" not in preset_names()
    for name in preset_names():
        assert find_preset(name) == find_preset(f"{name}.yaml") == FOLDER / f"{name}.yaml"
        assert preset_values(name)["num_layers"] > 0
    assert find_preset("recipes/paper_recipe") == FOLDER / "recipes" / "paper_recipe.yaml"


def test_what_a_preset_is_called():
    for given in ("mlra4_2.9b", "mlra4_2.9b.yaml", "a/b/mlra4_2.9b.yaml"):
        assert preset_name(given) == "mlra4_2.9b"


def test_a_path_still_works_and_a_file_beside_goes_before_the_packages(tmp_path):
    (tmp_path / "own").write_text("lr: 1")
    (tmp_path / "debug.yaml").write_text("base: debug\nlr: 2")
    assert preset_values("own") == {"lr": 1}
    assert preset_values(tmp_path / "own") == {"lr": 1}
    # The name alone is the package's; with its suffix it is the file that is here.
    assert preset_values("debug")["lr"] == 2.0e-3
    assert preset_values("debug.yaml")["lr"] == 2
    files = [file.resolve() for file, _ in preset_chain("debug.yaml")]
    assert files[-2:] == [FOLDER / "debug.yaml", tmp_path / "debug.yaml"]


def test_bases_are_paths_from_their_file_or_names(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "one.yaml").write_text("base: ../two.yaml\nlr: 1")
    (tmp_path / "two.yaml").write_text("base: mlra4_350m\nmin_lr: 0.5")
    values = preset_values("below/one.yaml")
    assert (values["lr"], values["min_lr"], values["num_layers"]) == (1, 0.5, 24)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("debugg", "debugg: no preset of this name, and no file; did you mean debug?"),
        ("zzz", "zzz: no preset of this name, and no file; mlra presets lists them"),
        (
            "examples/configs/debug.yaml",
            "examples/configs/debug.yaml: no such file; the preset of this name is --config debug",
        ),
        ("../../etc/passwd", "../../etc/passwd: no such file"),
    ],
)
def test_what_is_not_there_is_named(given, said):
    with pytest.raises(ValueError) as error:
        preset_values(given)
    assert str(error.value) == f"--config {said}"


def test_the_list_is_a_line_each():
    lines = preset_list().splitlines()
    assert [line.split()[0] for line in lines] == preset_names()
    (line,) = (line for line in lines if line.startswith("mlra4_2.9b "))
    assert line.split(maxsplit=2)[1:] == ["2.87B", "MLRA-4, 2.9B (4 latent heads, 4 branches)"]


def test_a_misspelt_key_prices_no_other_model(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("base: debug\nnum_layer: 2\n")
    said = re.escape(f"--config {preset}: unknown key 'num_layer'; did you mean num_layers?")
    with pytest.raises(ValueError, match=said):
        preset_values(preset)
