"""Data of one run that two tokenizers made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_mlra.data.cli import main
from megatron_mlra.training.arguments import parse
from megatron_mlra.training.batches import check_data_contents


@pytest.fixture
def make(tmp_path):
    """Words -> the prefix of a dataset by a tokenizer of these words, with ids in their order."""
    (tmp_path / "text.jsonl").write_text('{"text": "one two"}\n' * 3)

    def made(name: str, *words: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        vocabulary = {word: i for i, word in enumerate(("<eod>", *words))}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eod>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eod>"}))
        argv = ["--input", tmp_path / "text.jsonl", "--output-prefix", folder / "d"]
        argv += ["--tokenizer", "hf", "--tokenizer-model", folder / "tokenizer.json"]
        assert not main([*map(str, argv)])
        return str(folder / "d")

    return made


def said(*prefixes: str) -> list[str]:
    lines: list[str] = []
    check_data_contents(parse(["--config", "debug", "--data-path", *prefixes]), lines.append)
    return [line for line in lines if "warning" in line]


def test_two_tokenizers_are_told(make):
    one, other, same = make("a", "one", "two"), make("b", "two", "one"), make("c", "one", "two")
    (line,) = said(one, same, other)
    assert f"data {one} were made by tokenizer hf" in line and f"data {other} by" in line
    assert line.count("SHA-256") == 2
    assert said(one, same) == said(one) == []


def test_data_that_do_not_say_their_tokenizer_are_not_compared(make):
    one, other = make("a", "one", "two"), make("b", "two", "one")
    metadata = json.loads(Path(f"{other}.json").read_text())
    for unsaid in ({"tokenizer": {"type": "pretokenized"}}, {}):
        rest = {key: value for key, value in metadata.items() if key != "tokenizer"}
        Path(f"{other}.json").write_text(json.dumps(rest | unsaid))
        assert said(one, other) == []
