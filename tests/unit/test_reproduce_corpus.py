"""examples/reproduce: sources that are missing, large or changed."""

from __future__ import annotations

import argparse
import gc
import json
import weakref
from pathlib import Path

import pytest

import corpus
import corpus_sources
import tokenized


def test_books_that_are_no_clone_are_named(tmp_path):
    """A downloaded archive, for one, has no history that git could read."""
    (folder := tmp_path / "books").mkdir()
    with pytest.raises(ValueError, match=f"{folder} is no Git clone with a commit .*; clone"):
        list(corpus_sources.books(folder))


def test_fineweb_is_not_held_in_memory(monkeypatch):
    """The held-out set is read to its end before the training text is read at all."""

    class Text(list):
        """Paragraphs of a document, hashed as an object."""

        __hash__ = object.__hash__

    alive: weakref.WeakSet = weakref.WeakSet()

    def documents(files: list[Path]):
        for number in range(500):
            alive.add(text := Text([f"paragraph {number}"]))
            yield f"{files[0]}:{number}", text

    monkeypatch.setattr(corpus, "fineweb", documents)
    args = argparse.Namespace(fineweb=None, fineweb_files=[Path("a")])
    held_out, training = corpus.english_sets(args)
    names = [name for name, _ in held_out["fineweb"]]
    gc.collect()
    assert len(names) == 5 and len(alive) < 20
    rest = [name for name, _ in training]
    assert len(rest) == 495 and not {*names} & {*rest}


def test_a_tokenizer_of_another_size_is_not_taken(tmp_path):
    """A finished tokenizer is kept, but not for another --vocab-size."""
    (text := tmp_path / "text").mkdir()
    lines = [json.dumps({"text": f"word {n} of the line {n * n}"}) for n in range(300)]
    (text / "train.jsonl").write_text("\n".join(lines) + "\n")
    args = argparse.Namespace(
        text=text, out=tmp_path / "tokens", vocab_size=300, sample_mb=1, workers=1
    )
    made = tokenized.build(args)
    assert tokenized.build(args) == made
    args.vocab_size = 280
    with pytest.raises(ValueError, match=r"tokens/tokenizer has 300 tokens, not --vocab-size 280"):
        tokenized.build(args)
