"""Paths that come out of a checkpoint name what lies in its folder, and nothing else."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from megatron_mlra.checkpoint.files.inside import inside
from megatron_mlra.checkpoint.files.torch_dist_index import read_metadata
from megatron_mlra.checkpoint.files.tracker import TRACKER
from megatron_mlra.checkpoint.folder import tokenizer_files
from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.checkpoint.huggingface.folder import check_own_code
from megatron_mlra.checkpoint.megatron.folder import iteration_folder
from megatron_mlra.description.model import CheckpointError
from megatron_mlra.fault_tolerance.saved_steps import latest_step

pytestmark = pytest.mark.usefixtures("unsealed")

WORD = "a private key"
SECRET = Tokenizer(models.WordLevel({WORD: 0}, unk_token=WORD)).to_str()
"""A tokenizer of somebody else."""


@pytest.fixture
def secret(tmp_path) -> Path:
    file = tmp_path / "home" / "key.json"
    file.parent.mkdir()
    file.write_text(SECRET)
    return file


def with_arguments(folder: Path, **changes) -> None:
    """Rewrite the arguments of a Megatron folder, as whoever made it could."""
    args = open_checkpoint(folder).args
    for name, value in changes.items():
        setattr(args, name, value)
    release = folder / "release"
    metadata = read_metadata(release)
    for index in [i for i in metadata.storage_data if i.fqn.startswith("common_state")]:
        del metadata.storage_data[index]
        metadata.state_dict_metadata.pop(index.fqn, None)
    (release / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 0}, release / "common.pt")


def holds_no(secret: str, folder: Path) -> bool:
    return all(secret not in f.read_text("latin-1") for f in folder.rglob("*") if f.is_file())


def test_a_name_stays_in_its_folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "file").write_text("")
    (folder / "link").symlink_to("deep/../file")
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    (tmp_path / "folder2").mkdir()
    (folder / "neighbour").symlink_to(tmp_path / "folder2")
    (tmp_path / "alias").symlink_to(folder)
    for name in ("file", "link", "not there", "deep/file"):
        assert inside(folder, name) == folder / name
        assert inside(tmp_path / "alias", name) == tmp_path / "alias" / name
    for name in ("..", "../folder/file", "deep/../../x", "/etc/passwd", str(folder / "file"), "\0"):
        with pytest.raises(CheckpointError, match="which is no name of a file in it"):
            inside(folder, name)
    for name in ("out", "out/folder2", "neighbour"):
        with pytest.raises(CheckpointError, match="is a link out of its folder, to "):
            inside(folder, name)


def test_a_snapshot_of_the_hubs_cache_reads_its_blobs(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1f"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "aa").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/aa")
    assert tokenizer_files(snapshot) == [snapshot / "tokenizer.json"]
    (snapshot / "vocab.json").symlink_to("../../../elsewhere")
    (tmp_path / "elsewhere").write_text("")
    with pytest.raises(CheckpointError, match="is a link out of"):
        tokenizer_files(snapshot)
    (snapshot / "vocab.json").unlink()
    blobs.rename(tmp_path / "blobs")
    blobs.symlink_to(tmp_path / "blobs")
    with pytest.raises(CheckpointError, match="is a link out of"):
        tokenizer_files(snapshot)


@pytest.mark.parametrize("text", ["..", "/other", "release/..", "iter_0000001", "²", "-1", "1.0"])
def test_a_tracker_names_a_step_alone(text, megatron, convert, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(megatron / "release", other)
    (megatron / TRACKER).write_text(text.replace("/other", str(other)))
    for command in (["inspect", megatron], ["reshard", megatron, tmp_path / "out"]):
        code, error = convert(*command)
        assert code == 2 and "not a step; write the step of" in error and error.count("\n") == 1
    with pytest.raises(ValueError, match="not a step"):
        latest_step(megatron)
    assert not (tmp_path / "out").exists()


def test_a_step_that_is_a_link_elsewhere(megatron, convert, tmp_path):
    shutil.move(megatron / "release", tmp_path / "other")
    (megatron / "release").symlink_to(tmp_path / "other")
    code, error = convert("inspect", megatron)
    assert code == 2 and f"is a link out of its folder, to {tmp_path / 'other'}" in error
    # Whoever names the folder itself has chosen it.
    assert iteration_folder(megatron / "release") == megatron / "release"
    assert convert("inspect", megatron / "release")[0] == 0


@pytest.mark.parametrize("name", ["common.pt", ".metadata", "__0_0.distcp"])
def test_files_of_a_step_that_are_links(name, megatron, convert, tmp_path):
    with_arguments(megatron)
    shutil.move(megatron / "release" / name, tmp_path / name)
    (megatron / "release" / name).symlink_to(tmp_path / name)
    for command in (["inspect", megatron], ["reshard", megatron, tmp_path / "out"]):
        code, error = convert(*command)
        assert code == 2 and f"release/{name} is a link out of its folder" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["..", "."])
def test_metadata_that_names_a_folder(name, megatron, convert):
    file = megatron / "release" / ".metadata"
    metadata = read_metadata(file.parent)
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = replace(info, relative_path=name)
    file.write_bytes(pickle.dumps(metadata))
    code, error = convert("inspect", megatron)
    assert code == 2 and error.count("\n") == 1


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin"])
def test_files_of_a_research_folder_that_are_links(name, research, convert, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(research("MLA"), source)
    shutil.move(source / name, tmp_path / name)
    (source / name).symlink_to(tmp_path / name)
    code, error = convert("import-official", source, tmp_path / "out")
    assert code == 2 and f"{name} is a link out of its folder" in error
    assert not (tmp_path / "out").exists()


def test_shards_that_lie_elsewhere(megatron, convert, tmp_path):
    shards = tmp_path / "shards"
    assert convert("export-official", megatron, shards, "--max-shard-gb", 1e-4)[0] == 0
    index = shards / "model.safetensors.index.json"
    written = json.loads(index.read_text())
    first = next(iter(written["weight_map"].values()))
    shutil.move(shards / first, tmp_path / first)
    (shards / first).symlink_to(tmp_path / first)
    code, error = convert("inspect", shards)
    assert code == 2 and f"{first} is a link out of its folder" in error
    for elsewhere in (f"../{first}", str(tmp_path / first)):
        moved = {k: elsewhere if v == first else v for k, v in written["weight_map"].items()}
        index.write_text(json.dumps(written | {"weight_map": moved}))
        code, error = convert("inspect", shards)
        assert code == 2 and "names files outside its folder" in error


# -- tokenizers ------------------------------------------------------------------------------------

EXPORTS = (["export-hf"], ["export-official"], ["reshard"])


@pytest.mark.parametrize("command", EXPORTS, ids=" ".join)
@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer.json", "x.tiktoken"])
def test_a_tokenizer_file_that_is_a_link_is_not_copied(
    command, name, megatron, secret, convert, tmp_path
):
    (megatron / name).symlink_to(secret)
    code, error = convert(*command, megatron, tmp_path / "out")
    assert code == 2 and f"{name} is a link out of its folder, to {secret}" in error
    assert not (tmp_path / "out").exists()
    code, error = convert("inspect", megatron)
    assert code == 2 and str(secret) in error


@pytest.mark.parametrize("command", EXPORTS, ids=" ".join)
@pytest.mark.parametrize("named", ["config.json", "tokenizer.json", "", "key.json"])
def test_what_the_arguments_name_is_not_copied(command, named, megatron, secret, convert, tmp_path):
    for name in ("config.json", "tokenizer.json", "special_tokens_map.json"):
        shutil.copy(secret, secret.with_name(name))
    with_arguments(megatron, tokenizer_model=str(secret.parent / named))
    code, said = convert(*command, megatron, tmp_path / "out")
    assert code == 0 and holds_no("a private", tmp_path / "out")
    if command != ["reshard"] and named in ("tokenizer.json", ""):
        assert f"is not copied unless you name it: --tokenizer {secret.parent}\n" in said
    if command == ["export-hf"]:
        assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mlra"
    if command != ["reshard"]:
        argv = [*command, megatron, tmp_path / "given", "--tokenizer", secret.parent]
        code, said = convert(*argv)
        assert code == 0 and f"copied tokenizer.json from {secret.parent}/tokenizer.json\n" in said
        assert (tmp_path / "given" / "tokenizer.json").read_text() == SECRET


def test_a_named_tokenizer_of_links_is_read_and_not_copied(megatron, secret, convert, tmp_path):
    named = tmp_path / "named"
    named.mkdir()
    (named / "tokenizer.json").symlink_to(secret)
    with_arguments(megatron, tokenizer_model=str(named))
    assert open_checkpoint(megatron).named_tokenizer() == [named / "tokenizer.json"]
    code, said = convert("export-hf", megatron, tmp_path / "out")
    assert code == 0 and f"--tokenizer {named}\n" in said
    assert holds_no("a private", tmp_path / "out")
    code, error = convert("export-hf", megatron, tmp_path / "given", "--tokenizer", named)
    assert code == 2 and "is a link out of its folder" in error


def test_data_that_the_arguments_name_names_no_file_to_copy(megatron, secret, convert, tmp_path):
    from megatron_mlra.command_line.plain_file import sha256

    tokenizer = secret.with_name("tokenizer.json")
    shutil.copy(secret, tokenizer)
    described = {"type": "hf", "model": str(tokenizer), "sha256": sha256(tokenizer)}
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"version": 1, "vocab_size": 128, "tokenizer": described}))
    with_arguments(megatron, data_path=[str(tmp_path / "data")])
    code, said = convert("export-hf", megatron, tmp_path / "out")
    assert code == 0 and f"--tokenizer {secret.parent}\n" in said
    assert holds_no("a private", tmp_path / "out")
    described = {"type": "tiktoken", "model": str(secret)}
    data.write_text(json.dumps({"version": 1, "vocab_size": 128, "tokenizer": described}))
    code, said = convert("export-hf", megatron, tmp_path / "out2")
    assert code == 0 and f"names the file {secret} without its sha256" in said


def test_copies_are_said_and_leave_out_code(megatron, convert, tmp_path):
    (megatron / "tokenizer.json").write_text(SECRET)
    os.chmod(megatron / "tokenizer.json", 0o600)
    config = {"eos_token": "é", "auto_map": {"AutoTokenizer": "else/where--code.Tokenizer"}}
    (megatron / "tokenizer_config.json").write_text(json.dumps(config))
    (megatron / "generation_config.json").write_text("{}")
    for command in EXPORTS:
        out = tmp_path / command[0]
        code, said = convert(*command, megatron, out)
        assert code == 0 and f"copied tokenizer.json from {megatron / 'tokenizer.json'}\n" in said
        assert "tokenizer_config.json, without its auto_map {'AutoTokenizer': 'else/wh" in said
        assert json.loads((out / "tokenizer_config.json").read_text()) == {"eos_token": "é"}
        assert (out / "tokenizer.json").stat().st_mode & 0o044
    (megatron / "tokenizer_config.json").write_text("[]")
    code, error = convert("export-hf", megatron, tmp_path / "out")
    assert code == 2 and "tokenizer_config.json is not a JSON object" in error


def test_a_copy_replaces_nothing(tmp_path):
    from megatron_mlra.checkpoint.files.tokenizer_copy import copy_tokenizer

    file = tmp_path / "tokenizer.json"
    file.write_text("new")
    target = tmp_path / "out"
    target.mkdir()
    (target / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"would replace the tokenizer\.json that was just"):
        copy_tokenizer([file], target, str)
    with pytest.raises(CheckpointError, match=r"config\.json is no tokenizer file's name"):
        copy_tokenizer([tmp_path / "config.json"], target, str)
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("when", ["before the copy", "at the moment of the copy"])
def test_what_is_put_in_the_place_of_a_file_is_not_copied(when, tmp_path, monkeypatch):
    from megatron_mlra.checkpoint.files import inside as place
    from megatron_mlra.checkpoint.files.tokenizer_copy import copy_tokenizer

    source, target, secret = tmp_path / "in", tmp_path / "out", tmp_path / "secret"
    source.mkdir()
    target.mkdir()
    secret.write_text("secret")
    file = source / "tokenizer.json"
    file.write_text("{}")
    found = tokenizer_files(source)

    def swap(path) -> None:
        file.unlink()
        file.symlink_to(secret)

    if when == "before the copy":
        swap(file)
    else:
        opening = place.open_plain
        monkeypatch.setattr(place, "open_plain", lambda path: swap(path) or opening(path))
    with pytest.raises(CheckpointError, match=r"is a link out of its folder, to .*/secret"):
        copy_tokenizer(found, target, str)
    assert not list(target.iterdir())
    # Nor is a pipe waited for.
    monkeypatch.undo()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match=r"cannot be read \(it is no plain file"):
        copy_tokenizer(found, target, str)


@pytest.mark.parametrize(
    "code", ["else/where--modeling_mlra.Model", "../modeling_mlra.Model", "os.path", 5, ["a.B"]]
)
def test_code_elsewhere_is_not_run(code, megatron, convert, tmp_path):
    exported = tmp_path / "exported"
    assert convert("export-hf", megatron, exported)[0] == 0
    check_own_code(exported)
    config = json.loads((exported / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = code
    (exported / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="auto_map names other code"):
        check_own_code(exported)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("spec", ["canary", "Layer"], "--spec replaces the attention"),
        ("moe_layer_freq", "[__import__('canary')]", '--moe-layer-freq is "[__import__'),
        ("heterogeneous_layers_config_path", "/etc/passwd", "replaces the layers; leave it out"),
    ],
)
def test_nothing_that_arguments_of_a_checkpoint_name_is_run(
    name, value, said, megatron, tmp_path, monkeypatch
):
    """`--use-checkpoint-args` takes them, and Megatron imports the module of `spec`."""
    import importlib
    import sys

    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_mlra.training.arguments import parse, validate

    (tmp_path / "canary.py").write_text("class Layer: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with_arguments(megatron, **{name: value})
    monkeypatch.setattr("sys.argv", ["pretrain"])
    for variable, number in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(variable, number)
    argv = ["--config", "debug", "--load", str(megatron), "--use-checkpoint-args"]
    args = parse(argv)
    with pytest.raises(ValueError) as refused:
        gpt_config_from_args(args, validate(args))
    assert "canary" not in sys.modules
    assert str(refused.value).startswith("--use-checkpoint-args takes from ")
    assert said in str(refused.value)
