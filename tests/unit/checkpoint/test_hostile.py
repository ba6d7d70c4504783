"""Files that strangers send: no code of theirs runs, and none takes more than its size allows."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import struct
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_mlra.checkpoint.files import guarded_loads, torch_file
from megatron_mlra.checkpoint.files.torch_dist_index import read_metadata
from megatron_mlra.checkpoint.megatron.torch_dist import COMMON_KEY, TorchDistFolder
from megatron_mlra.evaluation import cli as evaluation
from megatron_mlra.fault_tolerance.integrity import check_complete
from megatron_mlra.inference import cli as generate
from megatron_mlra.training import hooks
from support import ROOT, hostile

pytestmark = pytest.mark.usefixtures("unsealed")


@pytest.fixture(scope="module")
def honest(research, tmp_path_factory) -> Path:
    """A Megatron folder."""
    from megatron_mlra.checkpoint.cli import main

    folder = tmp_path_factory.mktemp("honest") / "megatron"
    assert main(["import-official", str(research("MLRA-4")), str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture
def folder(honest, tmp_path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(honest, tmp_path / "megatron"))


def test_the_hostile_files_are_hostile(tmp_path):
    torch.load(io.BytesIO(hostile.script(tmp_path / "script")), weights_only=False)
    pickle.loads(pickle.dumps(hostile.Code(tmp_path / "pickle")))
    assert (tmp_path / "script").exists() and (tmp_path / "pickle").exists()


@pytest.mark.parametrize("make", hostile.CODE, ids=lambda make: make.__name__)
def test_code_is_listed_and_never_run(make, folder, convert, tmp_path, capsys):
    canary = tmp_path / "canary"
    make(folder / "release", canary)
    code, error = convert("inspect", folder)
    assert code == 1 and error.count("\n") == 1 and "holds code, which is not run: " in error
    assert ("TorchScript archive" if "script" in make.__name__ else "posix.mkdir in ") in error
    for command in ("export-official", "export-hf", "reshard"):
        code, refused = convert(command, folder, tmp_path / "out")
        assert code == 2 and refused == error
    assert convert("verify", folder, folder) == (2, error)
    assert generate.main([str(folder), "--prompt", "a"]) == 2
    (tmp_path / "text").write_text("text")
    assert evaluation.main([str(folder), "--text", str(tmp_path / "text")]) == 2
    assert capsys.readouterr().err == error * 2
    assert not canary.exists() and not (tmp_path / "out").exists()


def test_the_real_tool_is_as_careful(folder, warm_python, tmp_path):
    hostile.script_in_common_file(folder / "release", tmp_path / "canary")
    tool = ROOT / "tools/convert_checkpoint.py"
    ran = subprocess.run([warm_python, tool, "inspect", folder], capture_output=True, text=True)
    assert ran.returncode == 1 and "TorchScript archive" in ran.stderr
    assert not (tmp_path / "canary").exists()


def test_weights_that_are_code(research, convert, tmp_path):
    source = shutil.copytree(research("MLRA-4"), tmp_path / "source")
    for data, said in (
        (hostile.script(tmp_path / "canary"), "is a TorchScript archive"),
        (hostile.saved({"w": hostile.Code(tmp_path / "canary")}), "not run: posix.mkdir"),
    ):
        (source / "pytorch_model.bin").write_bytes(data)
        code, error = convert("inspect", source)
        assert code == 1 and said in error and error.count("\n") == 1
        assert convert("import-official", source, tmp_path / "out")[0] == 2
    assert not (tmp_path / "canary").exists()


def guard(monkeypatch) -> None:
    """Guard torch's readers as training/hooks.py does, until the test ends."""
    monkeypatch.setattr(FileSystemReader, "read_metadata", guarded_loads.read_metadata)
    monkeypatch.setattr(FileSystemReader, "_slice_file", guarded_loads.slice_file)
    monkeypatch.setattr(DefaultLoadPlanner, "load_bytes", guarded_loads.load_bytes)


def test_megatrons_own_loads_run_nothing(folder, tmp_path, monkeypatch):
    release, canary = folder / "release", tmp_path / "canary"

    def load() -> dict:
        state = {COMMON_KEY: io.BytesIO()}
        reader = FileSystemReader(release)
        torch.distributed.checkpoint.load(state, storage_reader=reader, no_dist=True)
        return state[COMMON_KEY][0]

    hostile.code_in_common_state(release, canary)
    load()
    assert canary.exists(), "torch's own reader no longer runs code: the guard can go"
    canary.rmdir()
    guard(monkeypatch)
    for make in (hostile.code_in_common_state, hostile.script_in_common_state):
        make(release, canary)
        with pytest.raises(CheckpointException, match="not run"):
            load()
    hostile.code_in_index(release, canary)
    with pytest.raises(CheckpointException):
        load()
    with pytest.raises(ValueError, match=r"posix\.mkdir in \.metadata"):
        FileSystemReader(release).read_metadata()
    assert not canary.exists()


def test_megatron_loads_the_files_that_were_checked(folder, convert):
    """Where `metadata.json` is missing Megatron reads `mp_rank_00`, which no index lists."""
    from megatron.training import checkpointing

    release = folder / "release"
    older = release / "mp_rank_00" / "model_optim_rng.pt"
    config = release / "metadata.json"
    honest = config.read_text()

    def plant() -> None:
        older.parent.mkdir()
        torch.save({"model": {}, "args": None}, older)

    def foreign() -> None:
        config.write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')

    hook = next(h for h in hooks.BEFORE_CHECKS if h.target.endswith("_get_checkpoint_format"))
    ask = hook.by[0](checkpointing._get_checkpoint_format, None)
    check_complete(release)
    assert ask(str(release), None) == "torch_dist"
    for change, said in (
        (config.unlink, "is incomplete: it has no metadata.json"),
        (foreign, "metadata.json names another format than torch_dist"),
        (plant, "also holds 'mp_rank_00', of Megatron's older format"),
    ):
        change()
        if change == config.unlink:
            # Megatron by itself would go by whatever else is there.
            assert checkpointing._get_checkpoint_format(str(release), Namespace()) != "torch_dist"
        code, error = convert("inspect", folder)
        assert code == 2 and said in error and error.count("\n") == 1, error
        for check in (check_complete, lambda path: ask(str(path), None)):
            with pytest.raises(ValueError, match=re.escape(said)):
                check(release)
        config.write_text(honest)


def test_a_tensor_larger_than_its_record(folder, convert, monkeypatch):
    name, release = "decoder.final_layernorm.weight", folder / "release"
    index = read_metadata(release)
    (info,) = (info for at, info in index.storage_data.items() if at.fqn == name)
    file = release / info.relative_path
    data = bytearray(file.read_bytes())
    count = data.index(b"K@", info.offset)  # the storage's 64 numbers
    data[count : count + 2] = b"K\xff"
    file.write_bytes(data)
    code, error = convert("inspect", folder)
    assert code == 2 and f"{name} in __0_0.distcp: a tensor of 1,020 bytes that has a" in error
    guard(monkeypatch)
    with pytest.raises(CheckpointException, match="a tensor of 1,020 bytes"):
        torch.distributed.checkpoint.load(
            {name: torch.empty(64)}, storage_reader=FileSystemReader(release), no_dist=True
        )


def test_honest_state_passes_the_guard(folder, monkeypatch):
    guard(monkeypatch)
    name = "decoder.final_layernorm.weight"
    state = {COMMON_KEY: io.BytesIO(), name: torch.zeros(64)}
    reader = FileSystemReader(folder / "release")
    torch.distributed.checkpoint.load(state, storage_reader=reader, no_dist=True)
    ours = TorchDistFolder(folder / "release").common_state()["args"]
    assert torch.equal(state[name], TorchDistFolder(folder / "release").tensor(name))
    assert vars(state[COMMON_KEY][0]["args"]) == vars(ours)


@pytest.mark.parametrize("name", hostile.PICKLES)
def test_pickles_that_grow(name, folder, convert, bounded):
    bomb, release = hostile.PICKLES[name], folder / "release"
    (release / "common.pt").write_bytes(hostile.repacked(hostile.saved({}), {"data.pkl": bomb}))
    code, error = convert("inspect", folder)
    assert code == 2 and "common.pt cannot be read (" in error
    (release / ".metadata").write_bytes(bomb)
    code, error = convert("inspect", folder)
    assert code == 2 and ".metadata cannot be read (" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", hostile.archives())
def test_archives_that_do_not_hold_what_they_say(name, tmp_path, research, convert):
    data, said = hostile.archives()[name]
    source = shutil.copytree(research("MLRA-4"), tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(data)
    code, error = convert("inspect", source)
    assert code == 2 and said in error and error.count("\n") == 1


def test_an_index_larger_than_what_it_describes(folder, convert, bounded):
    release = folder / "release"

    def refused(change) -> str:
        before = (release / ".metadata").read_bytes()
        hostile.change_index(release, change)
        code, error = convert("inspect", folder)
        (release / ".metadata").write_bytes(before)
        assert code == 2 and error.count("\n") == 1
        return error

    def entries(count: int):
        def add(index) -> None:
            at, info = next(iter(index.storage_data.items()))
            entry = index.state_dict_metadata[at.fqn]
            for i in range(count):
                index.state_dict_metadata[f"{at.fqn}{i}"] = entry
                index.storage_data[type(at)(f"{at.fqn}{i}")] = info

        return add

    assert "more than the files it describes can need" in refused(entries(100_000))
    assert "bytes of __0_0.distcp that are another's" in refused(entries(1))

    def larger(index) -> None:
        entry = index.state_dict_metadata["decoder.final_layernorm.weight"]
        entry.size = torch.Size([1 << 40])
        entry.chunks = [ChunkStorageMetadata(torch.Size([0]), entry.size)]

    assert "decoder.final_layernorm.weight is [1099511627776]" in refused(larger)

    def layers(index) -> None:
        name = "decoder.layers.mlp.linear_fc2.weight"
        index.state_dict_metadata[name].size = torch.Size([10**9, 64, 96])

    assert "decoder.layers.mlp.linear_fc2.weight is [1000000000, 64, 96]" in refused(layers)

    def text(index) -> None:
        next(iter(index.storage_data.values())).length = "1"

    assert "of no length" in refused(text)


def test_sizes_that_a_config_declares(research, honest, convert, tmp_path, bounded, capsys):
    official = shutil.copytree(research("MLRA-4"), tmp_path / "official")
    exported = tmp_path / "hf"
    assert convert("export-hf", honest, exported)[0] == 0
    keep = {folder: (folder / "config.json").read_text() for folder in (official, exported)}
    for folder, changes, said in (
        (official, {"n_layer": 10**9}, "n_layer is 1000000000, and the weights are"),
        (exported, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and"),
        (exported, {"max_position_embeddings": 10**12}, "it can be at most 2147483647"),
        (official, {"max_position_embeddings": 10**12}, "it can be at most 2147483647"),
        (exported, {"num_hidden_layers": "4"}, "num_layers is '4'"),
        (exported, {"num_hidden_layers": [[1]]}, "num_layers is [[1]]"),
        (exported, {"rope_parameters": 7}, "no model's (AttributeError"),
        (exported, {"num_attention_heads": None}, "num_attention_heads is None"),
        (exported, {"vocab_size": 10**400}, "config.json is not JSON"),
    ):
        hostile.write_config(folder, **changes)
        code, error = convert("inspect", folder)
        assert code == 2 and error.count("\n") == 1 and said in error, (changes, error)
        assert generate.main([str(folder), "--prompt", "a"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        (folder / "config.json").write_text(keep[folder])
    capsys.readouterr()
    # No table is made of positions that no sequence can reach.
    hostile.write_config(exported, max_position_embeddings=2**31 - 1)
    argv = ["--prompt", "a", "--max-new-tokens", "2", "--tokenizer", "byte"]
    generate.main([str(exported), *argv])
    assert "MemoryError" not in capsys.readouterr().err


def test_arguments_that_declare_sizes(folder, convert, bounded):
    state = TorchDistFolder(folder / "release").common_state()
    for name, value, said in (
        ("num_layers", 10**9, "num_layers is 1000000000, and the weights are"),
        ("max_position_embeddings", 10**12, "it can be at most 2147483647"),
        ("rotary_base", 10**400, "no model's (OverflowError"),
        ("num_layers", [2], "num_layers is [2]"),
        ("mtp_num_layers", "x", "mtp_num_layers is 'x'; it must be a whole number"),
        ("mtp_num_layers", True, "mtp_num_layers is True"),
        ("mtp_num_layers", 10**12, "it can be at most 10000"),
        ("mtp_num_layers", 3, "mtp_num_layers is 3, and the weights are 0 tensors"),
    ):
        args = type(state["args"])(**vars(state["args"]) | {name: value})
        hostile.replace_entry(
            folder / "release", COMMON_KEY, hostile.saved([state | {"args": args}])
        )
        code, error = convert("inspect", folder)
        assert code == 2 and error.count("\n") == 1 and said in error, error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "more than 100 levels"),
        ('{"a":' * 100_000, "more than 100 levels"),
        ('"' + '\\"' * 100_000 + "[" * 200, "Unterminated string"),
        ('{"rope_theta": NaN}', "NaN"),
        ('{"rope_theta": 1e999}', "beyond a float's range"),
        ('{"n": ' + "9" * 5000 + "}", "is not JSON"),
        (" " * (5 << 20), "more than 4,194,304 bytes"),
        ("[]", "is not a JSON object"),
    ],
)
def test_json_of_strangers(text, said, convert, tmp_path, bounded):
    (tmp_path / "config.json").write_text(text)
    code, error = convert("inspect", tmp_path)
    assert code == 2 and said in error and error.count("\n") == 1


def test_headers_of_safetensors(honest, convert, tmp_path, bounded):
    exported = tmp_path / "hf"
    assert convert("export-hf", honest, exported)[0] == 0
    (file,) = exported.glob("*.safetensors")
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(n for n in header if n != "__metadata__")
    wide = header | {name: header[name] | {"data_offsets": [0, 1 << 50]}}
    other = {**header, "again": header[name]}

    def packed(value: dict) -> bytes:
        text = json.dumps(value).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    for content, said in (
        (struct.pack("<Q", 1 << 60) + data[8:], "its header has 1,152,921,504,606,846,976 bytes"),
        (packed(wide), "cannot be read"),
        (packed(other), "cannot be read"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "cannot be read"),
        (b"1234", "its header has"),
    ):
        file.write_bytes(content)
        code, error = convert("inspect", exported)
        assert code == 2 and said in error and error.count("\n") == 1, error


def test_an_entry_of_an_old_format(tmp_path):
    file = tmp_path / "old.bin"
    torch.save({"w": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    assert torch.equal(torch_file.load_tensors(file)["w"], torch.ones(3))
    data = file.read_bytes()
    numbers = data.index(b"K\x03N")  # how many the storage has
    file.write_bytes(data[:numbers] + b"J\xff\xff\xff\x7fN" + data[numbers + 3 :])
    with pytest.raises(torch_file.TorchFileError, match=r"8,589,934,588 bytes, in a file of"):
        torch_file.load_tensors(file)
    torch.save(hostile.Code(tmp_path / "canary"), file, _use_new_zipfile_serialization=False)
    with pytest.raises(torch_file.ForbiddenCode, match=r"posix\.mkdir"):
        torch_file.load_tensors(file)
    assert not (tmp_path / "canary").exists()


def test_code_that_transformers_would_run(honest, convert, tmp_path):
    exported = tmp_path / "hf"
    assert convert("export-hf", honest, exported)[0] == 0
    code = (exported / "modeling_mlra.py").read_text()
    canary = f"\nopen({str(tmp_path / 'canary')!r}, 'w')\n"
    (exported / "modeling_mlra.py").write_text(code + canary)
    argv = ("verify", honest, exported, "--transformers", "--tokens", "8")
    status, error = convert(*argv)
    assert status == 2 and "modeling_mlra.py is not the code that this version exports" in error
    (exported / "modeling_mlra.py").write_text(code)
    config = json.loads((exported / "config.json").read_text())
    theirs = {k: f"someone/model--{v}" for k, v in config["auto_map"].items()}
    hostile.write_config(exported, auto_map=theirs)
    status, error = convert(*argv)
    assert status == 2 and "auto_map names other code" in error
    assert not (tmp_path / "canary").exists()
