"""A tokenizer.json of a stranger: patterns that give up, replacements that grow."""

from __future__ import annotations

import json

import pytest

from megatron_mlra.data.cli import main
from megatron_mlra.data.errors import InputError
from megatron_mlra.data.tokenizers import HFTokenizer


def written(folder, **parts):
    """A tokenizer.json with these parts."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    rest = dict.fromkeys(names) | {"version": "1.0", "added_tokens": [], "model": model}
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(rest | parts))
    return str(file)


def replace(content, **pattern):
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*parts):
    return {"type": "Sequence", "normalizers": parts}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}

GIVES_UP = {
    "type": "Split",
    "pattern": {"Regex": "(a|a?)+$|(?:(?:a+)+)+b"},
    "behavior": "Isolated",
    "invert": False,
}


def test_a_pattern_that_gives_up_is_an_error_of_the_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RUST_BACKTRACE", "0")
    file = written(tmp_path, pre_tokenizer=GIVES_UP)
    text = "a" * 40 + "c"
    with pytest.raises(InputError, match=r"tokenizer\.json fails on a text: .*retry-limit"):
        HFTokenizer(file, "[UNK]").tokenize(text)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "a"}) + "\n")
    argv = ["--input", str(data), "--output-prefix", str(tmp_path / "out"), "--tokenizer", "hf"]
    argv += ["--tokenizer-model", file, "--eod-token", "[UNK]", "--workers", "1"]
    assert main(argv) == 1
    assert "data.jsonl:1: the tokenizer failed: " in capsys.readouterr().err
    assert main([*argv, "--on-error", "skip"]) == 0


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": sequence(*[replace("a" * 30, String="a")] * 2)},
        {
            "normalizer": sequence(
                replace("aa", Regex="a"), sequence(*[replace("aa", Regex="a")] * 6)
            )
        },
        {"normalizer": sequence(*[replace("a", Regex="a*")] * 7)},
        {"normalizer": sequence(*[replace("a", Regex="(?=a)")] * 7)},
        {"normalizer": sequence(*[replace("a", Regex=r"[^\p{L}]*")] * 7)},
        {"normalizer": sequence(*[replace("a", Regex="(?>a)|\\K")] * 7)},
        {"normalizer": replace("a" * 101, String="a")},
        {"normalizer": replace("a" * 100, String="")},
        {"decoder": {"type": "Sequence", "decoders": [replace("a" * 30, String="a")] * 2}},
        {"normalizer": sequence(*[replace("\ufdfa", String="a"), {"type": "NFKC"}] * 2)},
        {"normalizer": sequence(replace("\ufdfa" * 6, String="a"), {"type": "NFKD"})},
        {"normalizer": sequence(*[{"type": "ByteLevel"}] * 4)},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 4}},
    ],
)
def test_replacements_that_grow_are_refused(parts, tmp_path):
    file = written(tmp_path, **parts)
    with pytest.raises(InputError, match="times as long"):
        HFTokenizer(file, "[UNK]")


@pytest.mark.parametrize(
    "normalizer",
    [
        sequence({"type": "Prepend", "prepend": "\u2581"}, replace("\u2581", String=" ")),
        sequence(
            *[replace(" ", Regex=r"\s+|\p{Z}(?=a)")] * 50, replace("", Regex="x*"), {"type": "NFKC"}
        ),
        sequence(*[{"type": kind} for kind in ("NFD", "Lowercase", "NFKD", "NFC", "NFKC")] * 9),
        sequence({"type": "NFKC"}, {"type": "ByteLevel"}),
        sequence(replace("...", String="\u2026"), replace('"', String="``")),
        None,
    ],
)
def test_ordinary_normalizers_are_taken(normalizer, tmp_path):
    assert HFTokenizer(written(tmp_path, normalizer=normalizer), "[UNK]").tokenize("a")
