"""Damaged, foreign and hostile checkpoints are refused by name; nothing is left half written."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mlra.checkpoint.files.torch_dist_index import read_metadata
from support.research_model import VARIANTS, save_research

pytestmark = pytest.mark.usefixtures("unsealed")

SIZES = VARIANTS["MLRA-4"]
UP = "transformer.h.1.attn.kv_b_proj"


class Code:
    """A pickle that, loaded, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def removed(weights):
    del weights[UP]


def renamed(weights):
    weights["transformer.h.1.attn.kv_c_proj"] = weights.pop(UP)


def reshaped(weights):
    weights[UP] = weights[UP][:, :, :-1].contiguous()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (removed, [f"missing {UP}"]),
        (renamed, [f"missing {UP}", "unknown transformer.h.1.attn.kv_c_proj [4, 16, 256]"]),
        (reshaped, [f"{UP} is [4, 16, 255], not [4, 16, 256]"]),
    ],
)
def test_wrong_tensors(damage, said, convert, tmp_path):
    weights = SIZES.weights()
    damage(weights)
    source = save_research(tmp_path / "source", SIZES, weights)
    code, error = convert("import-official", source, tmp_path / "out")
    assert code == 2 and error.count("\n") == 1
    assert "(MLRA-4) does not fit its model: " in error
    for part in said:
        assert part in error
    assert os.listdir(tmp_path) == ["source"]


def test_layers_of_two_variants(convert, tmp_path):
    weights = SIZES.weights()
    weights[UP] = VARIANTS["GLA-4"].weights()[UP]
    source = save_research(tmp_path / "source", SIZES, weights)
    code, error = convert("inspect", source)
    assert code == 2 and f"{UP} is [4, 16, 64], not [4, 16, 256]" in error


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_head": None}, "config.json: n_head is None"),
        ({"n_head": 6}, "no latents that serve 6 heads of 16"),
        ({"q_lora_rank": 16}, "transformer.h.0.attn.q_a_proj.weight is [32, 64], not [16, 64]"),
        ({"vocab_size": 130}, "transformer.wte.weight is [128, 64], not [130, 64]"),
        ({"n_layer": 3}, "missing transformer.h.2.input_layernorm.weight"),
        ({"n_layer": 1}, "unknown transformer.h.1."),
    ],
)
def test_config_of_another_model(changes, said, convert, tmp_path):
    source = save_research(tmp_path / "source", SIZES)
    config = {k: v for k, v in (SIZES.config() | changes).items() if v is not None}
    (source / "config.json").write_text(json.dumps(config))
    code, error = convert("inspect", source)
    assert code == 2 and said in error and error.count("\n") == 1


def test_truncated_and_missing_files(research, megatron, convert, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(research("MLRA-4"), cut)
    os.truncate(cut / "pytorch_model.bin", 20_000)
    code, error = convert("import-official", cut, tmp_path / "out")
    assert code == 2 and "pytorch_model.bin cannot be read, truncated?" in error
    for form in ("safetensors", "bin"):
        shards = tmp_path / form
        argv = ("--format", form, "--max-shard-gb", 1e-4)
        assert convert("export-official", megatron, shards, *argv)[0] == 0
        last = sorted(shards.glob(f"*0{'3' if form == 'bin' else '2'}-of-*.{form}"))[0]
        os.truncate(last, last.stat().st_size - 1000)
        code, error = convert("import-official", shards, tmp_path / "out")
        assert code == 2 and f"{last.name} cannot be read, truncated?" in error
        last.unlink()
        code, error = convert("import-official", shards, tmp_path / "out")
        assert code == 2 and f"is incomplete: {last.name} missing" in error
    weights = megatron / "release" / "__0_0.distcp"
    os.truncate(weights, weights.stat().st_size - 1)
    code, error = convert("export-official", megatron, tmp_path / "out")
    assert code == 2 and "is truncated: __0_0.distcp has " in error
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_damaged_bytes_inside_a_megatron_file(megatron, convert, tmp_path):
    weights = megatron / "release" / "__0_0.distcp"
    weights.write_bytes(weights.read_bytes().replace(b"PK\x03\x04", b"PK\x03\x05"))
    code, error = convert("export-official", megatron, tmp_path / "out")
    assert code == 2 and "cannot be read" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tensors_of_a_megatron_folder(megatron, convert, tmp_path):
    file = megatron / "release" / ".metadata"
    intact = file.read_bytes()
    key = "decoder.layers.self_attention.linear_proj.weight"
    canonical = "decoder.layers.1.self_attention.linear_proj.weight"
    metadata = read_metadata(file.parent)

    def stored(change) -> str:
        damaged = read_metadata(file.parent)
        entries = damaged.state_dict_metadata
        change(entries)
        # An index whose blocks and entries differ is refused for that, before its model is known.
        renamed = {} if "new.weight" not in entries else {key: "new.weight"}
        damaged.storage_data = {
            dataclasses.replace(at, fqn=renamed.get(at.fqn, at.fqn)): info
            for at, info in damaged.storage_data.items()
            if renamed.get(at.fqn, at.fqn) in entries
        }
        file.write_bytes(pickle.dumps(damaged))
        code, error = convert("export-official", megatron, tmp_path / "out")
        file.write_bytes(intact)
        assert code == 2 and error.count("\n") == 1
        return error

    assert f"missing {canonical}" in stored(lambda entries: entries.pop(key))
    error = stored(lambda entries: entries.update({"new.weight": entries.pop(key)}))
    assert f"missing {canonical}" in error and "unknown new.weight [2, 64, 128]" in error
    other = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    error = stored(lambda entries: entries.update({key: other}))
    assert f"{canonical} is [64, 96], not [64, 128]" in error


def test_metadata_that_leads_elsewhere(megatron, convert, tmp_path):
    file = megatron / "release" / ".metadata"
    key = "decoder.final_layernorm.weight"

    def refused(change) -> str:
        damaged = read_metadata(file.parent)
        before = file.read_bytes()
        change(damaged)
        file.write_bytes(pickle.dumps(damaged))
        code, error = convert("export-official", megatron, tmp_path / "out")
        file.write_bytes(before)
        assert code == 2 and error.count("\n") == 1 and not (tmp_path / "out").exists()
        return error

    def outside(metadata):
        (index,) = (index for index in metadata.storage_data if index.fqn == key)
        info = metadata.storage_data[index]
        metadata.storage_data[index] = replace(info, relative_path="../release/__0_0.distcp")

    def shorter(metadata):
        metadata.state_dict_metadata[key].chunks[0].sizes = torch.Size([63])

    def gone(metadata):
        metadata.state_dict_metadata[key].chunks.clear()

    assert ".metadata is not a torch_dist checkpoint's" in refused(outside)
    assert f"a block of {key} has 64 numbers, not 63" in refused(shorter)
    assert f"{key} has blocks for 0 of 64 numbers" in refused(gone)


def test_pickled_code_is_not_run(megatron, convert, tmp_path):
    mark = tmp_path / "mark"
    source = save_research(tmp_path / "source", SIZES, {"x": Code(mark)})
    code, error = convert("import-official", source, tmp_path / "out")
    assert code == 2 and "holds more than tensors, and is not run" in error
    torch.save({"args": Code(mark)}, megatron / "release" / "common.pt")
    code, error = convert("export-official", megatron, tmp_path / "out")
    assert code == 2 and "holds code, which is not run: posix.mkdir in common.pt" in error
    (megatron / "release" / ".metadata").write_bytes(pickle.dumps(Code(mark)))
    code, error = convert("inspect", megatron)
    assert code == 1 and "posix.mkdir in .metadata" in error
    assert not mark.exists()
    pickle.loads(pickle.dumps(Code(mark)))
    assert mark.exists()


def test_a_checkpoint_of_another_attention(megatron):
    from megatron_mlra.checkpoint.formats import open_checkpoint
    from megatron_mlra.description.megatron_args import check_convertible

    args = open_checkpoint(megatron).args
    for name, value, said in (
        ("attention", "tpa", "attention 'tpa' cannot be converted"),
        ("normalization", "LayerNorm", "normalization 'LayerNorm' cannot be converted"),
        ("kv_lora_rank", None, "name no kv_lora_rank"),
    ):
        with pytest.raises(ValueError) as refused:
            check_convertible(vars(args) | {name: value})
        assert said in str(refused.value)


def test_routing_that_nothing_here_computes(megatron):
    from megatron_mlra.checkpoint.formats import open_checkpoint
    from megatron_mlra.description.megatron_args import check_convertible, from_megatron_args

    args = vars(open_checkpoint(megatron).args)
    args |= {"num_experts": 8, "moe_router_topk": 2, "moe_layer_freq": 1}
    assert from_megatron_args(args).variant == "MLRA-4 MoE"
    for name, value, said in (
        ("moe_router_num_groups", 4, "a model with moe_router_num_groups (4) cannot be converted"),
        ("moe_shared_expert_gate", True, "a model with moe_shared_expert_gate (True)"),
        ("moe_router_load_balancing_type", "sinkhorn", "type 'sinkhorn' cannot be converted"),
        ("moe_router_score_function", "sqrtsoftplus", "'softmax' and 'sigmoid' are"),
        ("moe_router_dtype", "fp64", "moe_router_dtype 'fp64' is not supported"),
        ("moe_router_enable_expert_bias", True, "needs moe_router_score_function sigmoid"),
        ("moe_router_topk", 9, "moe_router_topk is 9, of 8 experts"),
        ("moe_layer_freq", [1], "use an integer or 2 zeros and ones"),
    ):
        with pytest.raises(ValueError) as refused:
            check_convertible(args | {name: value})
        assert said in str(refused.value)


def test_exported_experts_that_megatron_has_not():
    from megatron_mlra.checkpoint.huggingface.config import from_hf_config, to_hf_config
    from support.random_checkpoint import latent

    model = latent(
        4,
        4,
        num_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=16,
        moe_layer_pattern=(0, 1),
        moe_router_score_function="sigmoid",
    )
    config = to_hf_config(model)
    assert from_hf_config(config, "float32") == model.replace(tokenizer_type=None)
    for name, value, said in (
        ("norm_topk_prob", False, "norm_topk_prob False with sigmoid scores"),
        ("router_dtype", "float64", "router_dtype 'float64' has no counterpart"),
        ("mlp_layer_types", ["dense", "moe"], "mlp_layer_types 'moe' has no counterpart"),
        ("mlp_layer_types", ["sparse"], "needs a 0 or 1 for each of 2 layers"),
        ("rope_layer_types", ["nope"], "rope_layer_types is ['nope']; name rope or nope for each"),
        ("rope_layer_types", ["rope"], "rope_layer_types is ['rope']; name rope or nope for each"),
        ("rope_layer_types", [], "rope_layer_types is []; name rope or nope for each of 2"),
        ("rope_layer_types", [[], 1], "rope_layer_types is [[], 1]; name rope or nope for each"),
        ("scoring_func", "sqrtsoftplus", "'sqrtsoftplus' is not supported"),
    ):
        with pytest.raises(ValueError) as refused:
            from_hf_config(config | {name: value}, "float32")
        assert said in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qk_rope_head_dim": 0}, r"at least one pair, and this model none \(NoPE\)"),
        ({"query_head_norm": True}, "no norm of query heads; use export-hf"),
        ({"no_rope_pattern": (0, 1)}, "rotates in every layer; use export-hf"),
    ],
)
def test_what_the_research_code_has_not_is_refused(changes, said, tmp_path):
    from megatron_mlra.checkpoint.research.folder import write_research
    from support.random_checkpoint import RandomFolder, latent

    source = RandomFolder(latent(4, 4, v_head_dim=16, **changes))
    with pytest.raises(ValueError, match=said):
        write_research(source, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["inspect", "nowhere"], "nowhere is not a folder"),
        (["inspect", "."], "holds no checkpoint"),
        (["import-hf", "{source}", "out"], "is a research folder; import-hf reads huggingface"),
        (["reshard", "{source}", "out"], "is not a Megatron folder: it has neither"),
        (["reshard", "{source}", "out", "--dtype", "bfloat16"], "add --weights-only"),
        (
            ["export-official", "{source}", "out", "--max-shard-gb", "inf"],
            "inf is no number above 0",
        ),
        (["verify", "{source}", "{source}", "--tolerance", "-1"], "-1 is no number of at least 0"),
    ],
)
def test_bad_arguments(argv, said, research, convert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, error = convert(*(word.format(source=research("MLA")) for word in argv))
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert said in error
    assert not os.listdir(tmp_path)
