"""The models that vLLM's benchmark serves are the presets, as they are exported."""

from __future__ import annotations

import json

import pytest

from megatron_mlra.checkpoint.huggingface.config import to_hf_config
from megatron_mlra.description.presets import preset_description
from mlra_vllm.benchmarks.shapes import SHAPES, misfit, write_shape, write_tokenizer
from support import CONFIGS


@pytest.mark.parametrize("name", ["mlra4", "mla", "gla2", "gqa6"])
def test_a_shape_is_a_preset(name, tmp_path):
    write_shape(name, tmp_path / "model", 2048)
    expected = to_hf_config(preset_description(str(CONFIGS / f"{name.rstrip('6')}_2.9b.yaml")))
    # The plugin brings the code.
    expected.pop("auto_map", None)
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == expected


def test_no_prompt_has_more_characters_than_vllm_lets_pass(tmp_path):
    """vLLM refuses a prompt of more characters than the longest word times the tokens it takes."""
    write_tokenizer(tmp_path)
    words = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    longest = max(words, key=len)
    assert all(len(word) + 1 <= len(longest) for word in words if word != longest)


def test_sizes_that_share_a_model_are_those_of_its_server():
    fit = {
        name: [tp for tp in (1, 2, 3, 4, 5, 6, 8, 12, 24) if not misfit([name], [tp])]
        for name in SHAPES
    }
    # The plugin pads the inner dim of a latent model to any size.
    assert fit["mla"] == [1, 2, 3, 4, 6, 8, 12, 24] and fit["mlra4"] == [1, 2, 4, 8, 12, 24]
    assert fit["gla2"] == [1, 2, 4, 6, 8, 12, 24] and fit["gqa6"] == [1, 2]
