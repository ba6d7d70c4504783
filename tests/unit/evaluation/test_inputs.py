"""Texts that `mlra evaluate` and `mlra analyze` cannot score."""

from __future__ import annotations

import json
import math

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_mlra.checkpoint.huggingface.folder import write_huggingface
from megatron_mlra.evaluation.analysis.cli import main as analyze
from megatron_mlra.evaluation.cli import main as evaluate
from megatron_mlra.evaluation.cli import perplexity
from megatron_mlra.evaluation.scoring import Score
from support.random_checkpoint import RandomFolder, latent


@pytest.mark.parametrize("main", [evaluate, analyze])
def test_a_text_without_tokens_is_named(main, tmp_path, capsys):
    """A tokenizer of words makes none of blanks."""
    write_huggingface(RandomFolder(latent(4, 4)), tmp_path / "model", tokenizer="byte")
    words = Tokenizer(models.WordLevel({"<e>": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder := tmp_path / "words").mkdir()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<e>"}))
    (text := tmp_path / "blank.txt").write_text("\n \n")
    flags = ["--text", str(text), "--tokenizer", str(folder), "--device", "cpu"]
    assert main([str(tmp_path / "model"), *flags]) == 2
    said = f"error: {text} has no tokens, by its tokenizer; give a text with words\n"
    assert capsys.readouterr().err.endswith(said)


def test_a_loss_beyond_the_range_of_exp_is_told():
    """As of a model of broken weights: the line and a task's results had a limit, the JSON none."""
    found = perplexity(Score(-8000.0, False, 10), "abc")
    assert found["perplexity"] == pytest.approx(math.exp(700)) and json.dumps(found)
