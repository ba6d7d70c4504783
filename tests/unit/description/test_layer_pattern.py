"""Patterns of layers: as Megatron reads them, and nothing is evaluated."""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest
from megatron.training.arguments import moe_freq_type

from megatron_mlra.description.layer_pattern import layer_pattern
from megatron_mlra.description.presets import preset_values

RIGHT = (
    "1",
    "7",
    "[1,0]",
    "[0]*3",
    "3*[0]",
    "([0]+[1]*26)",
    "([0]*3+[1])*6",
    "([1]*3+[0]*1)*3",
    "[1,0]*2*3+([1])",
)
WRONG = (
    *("", "x", "0", "-1", "3.5", "1e3", "[", "[1", "([0]*", "[2]", "[[1]]", "[1]**2", "[-1]"),
    *("[]", "[1]*0", "[1](2)", "(1)", "[1]+2", "[1]*[1]", "[x]", "[True]", "'[1]'", "[1]*0x4"),
    *("[0]*99999999999", "[0]*9*9*9*9*9*9*9*9*9*9*9*9", "9**9**9**9", "[1]*9**9**9**9"),
    *("(" * 5000 + "[1]" + ")" * 5000, "+".join(["[1]"] * 20000), "[1 for _ in [1]]", "[1]\0"),
)


@pytest.mark.parametrize("text", RIGHT)
def test_a_pattern_is_what_megatron_makes_of_it(text):
    assert layer_pattern(text) == moe_freq_type(text)


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ArgumentTypeError, match="is not valid; use a number N, or a 0"):
        layer_pattern(text)


def test_a_preset_is_read_alike_without_megatron(tmp_path):
    (tmp_path / "a.yaml").write_text("base: debug\nmoe_layer_freq: ([0]*3+[1])*2\n")
    assert preset_values(tmp_path / "a.yaml")["moe_layer_freq"] == [0, 0, 0, 1] * 2
    (tmp_path / "a.yaml").write_text("base: debug\nno_rope_freq: '[0]*99999999999'\n")
    with pytest.raises(ValueError, match=r"no_rope_freq: .* is not valid; use"):
        preset_values(tmp_path / "a.yaml")
