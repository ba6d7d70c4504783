"""Conversions keep the function and the bits: every variant, through the command line."""

from __future__ import annotations

import json
import math
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

from megatron_mlra.checkpoint.files.torch_dist_index import read_metadata
from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.checkpoint.verify.forward import hidden_states
from megatron_mlra.checkpoint.verify.forward import logits as streamed_logits
from support.research_model import VARIANTS, logits, save_research
from support.tensors import assert_same_tensors, weights_of

TOKENS = torch.randint(128, (24,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_research_to_megatron_and_back(variant, research, convert, tmp_path):
    source, megatron, back = research(variant), tmp_path / "megatron", tmp_path / "back"
    assert convert("import-official", source, megatron)[0] == 0
    opened = open_checkpoint(megatron)
    assert opened.description.variant == variant
    assert opened.description.tie_embeddings == VARIANTS[variant].tied

    # The same function as the research code's.
    sizes = VARIANTS[variant]
    expected = logits(sizes, sizes.weights(), TOKENS)
    with torch.no_grad():
        *_, state = hidden_states(opened, TOKENS[None])
        found = streamed_logits(opened, state)[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    assert expected.abs().max() > 1

    # The same bits, both ways and in both formats.
    assert convert("export-official", megatron, back)[0] == 0
    stored, returned = sizes.weights(), weights_of(back)
    if sizes.tied:
        stored.pop("lm_head.weight")
    assert returned.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(returned[name], tensor), name
    bins, again = tmp_path / "bins", tmp_path / "again"
    assert convert("export-official", megatron, bins, "--format", "bin")[0] == 0
    assert convert("import-official", bins, again)[0] == 0
    assert_same_tensors(megatron, again)


def test_shards_and_their_index(research, convert, tmp_path):
    source, megatron = research("MLRA-4"), tmp_path / "megatron"
    assert convert("import-official", source, megatron)[0] == 0
    shards = tmp_path / "shards"
    assert convert("export-official", megatron, shards, "--max-shard-gb", 1e-4)[0] == 0
    index = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(path.name for path in shards.glob("*.safetensors"))
    assert len(files) > 2 and set(index.values()) == set(files)
    assert all((shards / file).stat().st_size < 110_000 for file in files)
    for file in files:
        assert load_file(shards / file).keys() == {n for n, f in index.items() if f == file}
    assert_same_tensors(megatron, shards)


def test_tokenizer_files_come_along(research, convert, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(research("MLA"), source)
    (source / "tokenizer.json").write_text("{}")
    for command, name in (("import-official", "megatron"), ("export-official", "back")):
        assert convert(command, source, tmp_path / name)[0] == 0
        source = tmp_path / name
        assert (source / "tokenizer.json").read_text() == "{}"


def test_vocabulary_padding(research, convert, tmp_path):
    source, megatron = research("MLRA-2 gated"), tmp_path / "megatron"
    assert convert("import-official", source, megatron, "--padded-vocab-size", 160)[0] == 0
    stored = {name: torch.empty(160, 64) for name in ("embedding.word_embeddings.weight",)}
    stored["output_layer.weight"] = torch.empty(160, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(stored, storage_reader=dcp.FileSystemReader(megatron / "release"), no_dist=True)
    opened = open_checkpoint(megatron)
    for name, rows in stored.items():
        assert torch.equal(opened.tensor(name), rows[:128])
        assert rows[:128].any(1).all() and not rows[128:].any()
    code, error = convert("import-official", source, tmp_path / "x", "--padded-vocab-size", 127)
    assert code == 2 and "padded_vocab_size 127 is smaller than the vocabulary of 128" in error
    code, error = convert("export-official", megatron, tmp_path / "x", "--vocab-size", 161)
    assert code == 2 and "--vocab-size 161 is more than the 160 rows of embedding." in error


def test_other_ways_to_store_a_megatron_checkpoint(research, convert, tmp_path):
    """Layers apart, norms under their own names, extra states, arguments in common.pt."""
    megatron, other = tmp_path / "megatron", tmp_path / "other"
    assert convert("import-official", research("MLRA-2 gated"), megatron)[0] == 0
    opened = open_checkpoint(megatron)
    state = dict(opened.tensors())
    state |= {f"optimizer.state.exp_avg.{name}": tensor for name, tensor in opened.tensors()}
    state["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=dcp.FileSystemWriter(other), no_dist=True)
    torch.save({"args": opened.args, "iteration": 12}, other / "common.pt")
    shutil.copy(megatron / "release/metadata.json", other)
    assert open_checkpoint(other).iteration == 12
    assert_same_tensors(megatron, other)
    # The same tensors after a rewrite, in two files.
    again = tmp_path / "again"
    assert convert("reshard", other, again, "--files", 2, "--weights-only")[0] == 0
    assert_same_tensors(megatron, again)
    stored = read_metadata(again / "release").state_dict_metadata
    assert not any(name.startswith("optimizer") for name in stored)
    assert len(list((again / "release").glob("*.distcp"))) == 2


def test_dtypes(research, convert, tmp_path):
    half, back = tmp_path / "half", tmp_path / "back"
    assert convert("import-official", research("GLA-2"), half, "--dtype", "bfloat16")[0] == 0
    assert open_checkpoint(half).description.dtype == "bfloat16"
    assert convert("export-official", half, back)[0] == 0
    returned = weights_of(back)
    for name, tensor in VARIANTS["GLA-2"].weights().items():
        if name != "lm_head.weight":
            assert torch.equal(returned[name], tensor.bfloat16()), name
    code, said = convert("verify", research("GLA-2"), half)
    assert code == 1 and "NOT within the tolerance 0.0001" in said
    code, said = convert("verify", research("GLA-2"), half, "--tolerance", 1)
    assert code == 0 and "512 tokens: logits differ by at most" in said


def test_mixed_dtypes_keep_every_number(convert, tmp_path):
    weights = VARIANTS["MLRA-2"].weights()
    mixed = {n: t if t.dim() == 1 else t.bfloat16() for n, t in weights.items()}
    source = save_research(tmp_path / "source", VARIANTS["MLRA-2"], mixed)
    assert convert("import-official", source, tmp_path / "megatron")[0] == 0
    assert convert("export-official", tmp_path / "megatron", tmp_path / "back")[0] == 0
    for name, tensor in weights_of(tmp_path / "back").items():
        assert torch.equal(tensor, mixed[name].float()), name
    mixed["layernorm.weight"] = mixed["layernorm.weight"].to(torch.float8_e4m3fn)
    torch.save(mixed, source / "pytorch_model.bin")
    code, error = convert("inspect", source)
    assert code == 2 and "layernorm.weight is torch.float8_e4m3fn, which cannot be conv" in error


def test_verify_sees_one_changed_number(research, convert, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(research("GLA-4"), changed)
    weights = VARIANTS["GLA-4"].weights()
    assert convert("verify", research("GLA-4"), changed)[0] == 0
    weights["transformer.h.1.attn.kv_b_proj"][3, 2, 1] += 0.5
    torch.save(weights, changed / "pytorch_model.bin")
    code, said = convert("verify", research("GLA-4"), changed, "--tokens", 64, "--length", 32)
    assert code == 1 and said.startswith("sample text, bytes as ids; 64 tokens: ")
    weights["transformer.h.1.attn.kv_b_proj"][3, 2, 1] = float("nan")
    torch.save(weights, changed / "pytorch_model.bin")
    code, error = convert("verify", research("GLA-4"), changed)
    assert code == 2 and "kv_up_proj.weight has 1 NaN or infinite of " in error
    code, error = convert("verify", research("GLA-4"), research("MLRA-4"))
    assert code == 2 and "differ: num_branches is 1 and 4" in error


def test_inspect(research, convert):
    code, said = convert("inspect", research("MLRA-2 gated"))
    assert code == 0
    count = sum(math.prod(shape) for shape in VARIANTS["MLRA-2 gated"].shapes().values())
    assert f"research checkpoint of MLRA-2 gated, {count:,} parameters, float32" in said
    assert "vocabulary 128 (untied)" in said
    assert "decoder.layers.*.self_attention.linear_kv_up_proj.weight [2, 8, 32, 16] x 2" in said
