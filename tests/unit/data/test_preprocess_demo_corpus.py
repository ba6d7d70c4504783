"""The demo's corpus: deterministic, real, without repetitions, readable by the preprocessing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mlra.data import write_demo_corpus
from megatron_mlra.data.cli import main
from support import ROOT


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_whole_corpus(tmp_path):
    size = write_demo_corpus(tmp_path / "a.jsonl", 10**9)
    texts = texts_of(tmp_path / "a.jsonl")
    assert size.documents == len(texts) > 300
    assert size.text_bytes == sum(len(text.encode()) for text in texts) > 5_000_000
    assert len(set(texts)) == len(texts)
    assert any("class JSONDecoder" in text for text in texts)
    assert any(text.startswith("itertools\n") for text in texts)
    assert any(text.startswith('The "assert" statement\n') for text in texts)


def test_order_depends_on_the_seed_alone(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_demo_corpus(tmp_path / name, 10**9, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert texts_of(tmp_path / "a") != texts_of(tmp_path / "c")
    assert sorted(texts_of(tmp_path / "a")) == sorted(texts_of(tmp_path / "c"))


def test_limit_cuts_the_shuffled_corpus(tmp_path):
    write_demo_corpus(tmp_path / "a.jsonl", 10**9)
    size = write_demo_corpus(tmp_path / "b.jsonl", 500_000)
    assert 0 < size.text_bytes <= 500_000
    assert texts_of(tmp_path / "b.jsonl") == texts_of(tmp_path / "a.jsonl")[: size.documents]
    with pytest.raises(ValueError, match="hold no document"):
        write_demo_corpus(tmp_path / "c.jsonl", 10)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.jsonl"]


def test_command_line_and_tokenising(tmp_path):
    tool = [sys.executable, str(ROOT / "tools/demo_corpus.py"), "corpus.jsonl", "--max-mb", "0.5"]
    run = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True}
    first = subprocess.run(tool, **run, check=True, text=True)
    again = subprocess.run(tool, **run, check=False, text=True)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == "error: corpus.jsonl exists: pass --overwrite to replace it\n"
    corpus = tmp_path / "corpus.jsonl"
    prefix = str(tmp_path / "out")
    assert main(["--input", str(corpus), "--output-prefix", prefix, "--tokenizer", "byte"]) == 0
    metadata = json.loads(Path(prefix + ".json").read_text())
    text_bytes = sum(len(text.encode()) for text in texts_of(corpus))
    assert metadata["tokens"] == text_bytes + metadata["documents"]
    assert first.stdout.startswith(f"{metadata['documents']} documents, {text_bytes} bytes of text")
