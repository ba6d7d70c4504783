"""What `mlra inspect` says of a model."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from megatron_mlra.checkpoint.tokenizer import data_prefixes
from megatron_mlra.checkpoint.verify.summary import lines
from support.random_checkpoint import RandomFolder, latent


@pytest.mark.parametrize(("dims", "said"), [(8, "RoPE base 10000"), (0, "no RoPE (NoPE)")])
def test_a_model_without_rope_has_no_base_of_it(dims, said):
    sizes = lines(RandomFolder(latent(4, 4, qk_rope_head_dim=dims)))[1]
    assert f" 64 positions, {said}, eps " in sizes


@pytest.mark.parametrize("normed", [False, True])
def test_a_norm_of_query_heads_is_named(normed):
    said = lines(RandomFolder(latent(4, 4, query_head_norm=normed)))
    assert said[2].endswith(", norm of query heads") == normed
    assert any("query_head_norm.weight [192] x 2" in line for line in said) == normed


def test_layers_without_rope_are_counted():
    sizes = lines(RandomFolder(latent(4, 4, no_rope_pattern=(0, 1))))[1]
    assert ", RoPE base 10000 (none in 1 of 2 layers), eps " in sizes


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        ({"type": "byte"}, "bytes, by the metadata of the run's data"),
        ({"type": "tiktoken", "model": "gpt2"}, "tiktoken gpt2, by the metadata of the run's data"),
        ({"type": "hf", "model": "/gone"}, "that of the run's data, but /gone is gone or is not"),
        (None, "NullTokenizer, files: none"),
    ],
)
def test_a_run_without_tokenizer_files_has_that_of_its_data(tmp_path, tokenizer, said):
    folder = RandomFolder(latent(4, 4, tokenizer_type="NullTokenizer"), tmp_path)
    if tokenizer:
        folder.args = Namespace(data_path=[str(tmp_path / "data")])
        metadata = {"version": 1, "vocab_size": 257, "eod_id": 256, "tokenizer": tokenizer}
        (tmp_path / "data.json").write_text(json.dumps(metadata))
    assert any(line.startswith(f"tokenizer: {said}") for line in lines(folder))


@pytest.mark.parametrize(("tied", "more"), [(True, 15 * 96), (False, 2 * 15 * 96)])
def test_padding_of_the_vocabulary_is_counted_apart(tied, more):
    sizes = {"vocab_size": 257, "tie_embeddings": tied, "hidden_size": 96}
    padded = lines(RandomFolder(latent(4, 4, padded_vocab_size=272, **sizes)))[0]
    assert f" parameters (+{more:,} of padding rows of the vocabulary), " in padded
    assert "padding" not in lines(RandomFolder(latent(4, 4, **sizes)))[0]


def test_a_run_on_data_by_parts_has_the_tokenizer_of_what_it_trained_on(tmp_path):
    folder = RandomFolder(latent(4, 4, tokenizer_type="NullTokenizer"), tmp_path)
    prefix = str(tmp_path / "train")
    folder.args = Namespace(data_path=None, train_data_path=["0.5", prefix], valid_data_path=["v"])
    metadata = {"version": 1, "vocab_size": 257, "eod_id": 256, "tokenizer": {"type": "byte"}}
    (tmp_path / "train.json").write_text(json.dumps(metadata))
    said = "tokenizer: bytes, by the metadata of the run's data"
    assert said in lines(folder) and data_prefixes(folder) == [prefix]
