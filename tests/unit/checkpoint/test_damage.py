"""Changed bytes, NaN and impossible numbers are refused by every tool that reads weights."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_mlra.checkpoint.files.manifest import MANIFEST, damage
from megatron_mlra.checkpoint.folder import check_finite
from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.checkpoint.huggingface.folder import write_huggingface
from megatron_mlra.checkpoint.megatron.torch_dist import TorchDistFolder
from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.description.model import CheckpointError
from megatron_mlra.evaluation import cli as evaluation
from megatron_mlra.evaluation.analysis import cli as analysis
from megatron_mlra.inference import cli as generation
from support.hostile import write_config
from support.random_checkpoint import RandomFolder, grouped, latent

MODEL = latent(4, 4, v_head_dim=16)
NORM = "decoder.final_layernorm.weight"


class Spoilt(RandomFolder):
    """Random weights, one number of which is not."""

    value = float("nan")

    def tensor(self, name):
        tensor = super().tensor(name)
        if name == NORM:
            tensor[3] = self.value
        return tensor


@pytest.fixture
def saved(tmp_path):
    """A Megatron folder with a manifest, as a run and a conversion leave it."""
    write_megatron(RandomFolder(MODEL), tmp_path / "saved", progress=False)
    return tmp_path / "saved"


@pytest.fixture
def tools(convert, tmp_path, capsys):
    """Every tool on a Megatron folder: its name -> (exit code, error)."""

    def run(folder, *flags):
        text = tmp_path / "text.txt"
        text.write_text("words " * 9)
        found = {}
        for name in ("export-hf", "export-official", "reshard"):
            found[name] = convert(name, folder, tmp_path / f"{name}{len(flags)}", *flags)
        found["inspect"] = convert("inspect", folder, *flags)
        found["verify"] = convert("verify", folder, folder, "--tokens", 32, *flags)
        argv = [str(folder), *flags]
        for name, main, more in (
            ("generate", generation.main, ["--prompt", "a", "--max-new-tokens", "2"]),
            ("evaluate", evaluation.main, ["--text", str(text), "--device", "cpu"]),
            ("analyze", analysis.main, ["--text", str(text), "--device", "cpu"]),
        ):
            capsys.readouterr()
            found[name] = (main([*argv, *more]), capsys.readouterr().err)
        return found

    return run


def test_one_flipped_bit_is_refused_by_every_tool(saved, tools):
    weights = saved / "release/__0_0.distcp"
    data = bytearray(weights.read_bytes())
    info = TorchDistFolder(saved / "release").stored[NORM, (0,)]
    data[info.offset + info.length // 2] ^= 1
    weights.write_bytes(data)
    for name, (code, error) in tools(saved).items():
        assert code == 2 and error.count("\n") == 1, (name, error)
        assert "release is damaged: __0_0.distcp does not match its checksum; use" in error, name
    for name, (code, error) in tools(saved, "--no-verify").items():
        assert code == 0, (name, error)


MANIFESTS = {
    "array": ("[]", "integrity.json cannot be read (it holds no object of files)"),
    "numbers": ('{"files": {".metadata": 3}}', "integrity.json has an entry that is no file of"),
    "list": ('{"files": [".metadata"]}', "integrity.json cannot be read (it holds no object of"),
    "nothing": ('{"files": {}}', "integrity.json has no entry of .metadata"),
    "text": ("{", "integrity.json cannot be read ("),
    "outside": (
        '{"files": {"../x": "0"}}',
        "integrity.json has an entry that is no file of the folder",
    ),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_is_none(saved, case, convert):
    text, said = MANIFESTS[case]
    (saved / "release" / MANIFEST).write_text(text)
    assert said in damage(saved / "release")
    code, error = convert("inspect", saved)
    assert code == 2 and said in error and error.count("\n") == 1


def test_files_without_an_entry(saved, convert):
    path = saved / "release" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["files"]["__0_0.distcp"]
    path.write_text(json.dumps(manifest))
    code, error = convert("inspect", saved)
    assert code == 2 and "integrity.json has no entry of __0_0.distcp" in error


def test_numbers_that_are_none_are_refused_by_every_tool(tools, tmp_path):
    write_megatron(Spoilt(MODEL), tmp_path / "saved", progress=False)
    for name, (code, error) in tools(tmp_path / "saved").items():
        said = f"{NORM} has 1 NaN or infinite of 64 numbers; the run that saved it had diverged"
        assert code == 2 and said in error and error.count("\n") == 1, (name, error)


def test_of_exported_folders_too(convert, tmp_path):
    write_huggingface(Spoilt(grouped(2)), tmp_path / "exported", progress=False)
    for argv in (("inspect",), ("import-hf",), ("export-official",)):
        destination = [] if argv == ("inspect",) else [tmp_path / "out"]
        code, error = convert(*argv, tmp_path / "exported", *destination)
        assert code == 2 and "has 1 NaN or infinite of 64 numbers" in error
    assert not (tmp_path / "out").exists()


def test_numbers_beyond_the_dtype_that_is_asked_for(convert, tmp_path):
    large = Spoilt(MODEL)
    large.value = 1e6
    write_megatron(large, tmp_path / "saved", progress=False)
    argv = (tmp_path / "saved", tmp_path / "out", "--dtype", "float16")
    code, error = convert("export-official", *argv)
    assert code == 2 and f"{NORM} has numbers beyond the range of float16; use bfloat16" in error
    code, error = convert("reshard", *argv, "--weights-only")
    assert code == 2 and f"{NORM} in torch.float16 has 1 NaN or infinite" in error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_numbers_of_every_dtype(dtype):
    tensor = torch.full((3, 2), torch.finfo(dtype).max, dtype=dtype)
    check_finite(tensor, "x")
    check_finite(tensor[:0], "x")
    check_finite(torch.ones(3, dtype=torch.int64), "x")
    for value in ("nan", "inf", "-inf"):
        tensor[1, 1] = float(value)
        with pytest.raises(CheckpointError, match="x has 1 NaN or infinite of 6 numbers"):
            check_finite(tensor, "x")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        *(("rotary_base", v, "rotary_base is ") for v in (0, -1.0, float("nan"), "1e4", None)),
        ("rotary_base", True, "rotary_base is True; it must be a finite number"),
        ("layernorm_epsilon", 0.0, "layernorm_epsilon is 0.0; it must be positive"),
        ("softmax_scale", float("inf"), "softmax_scale is inf; it must be a finite number"),
        ("softmax_scale", 0.0, "softmax_scale is 0.0; it must be positive"),
        ("mscale", float("nan"), "mscale is nan; it must be a finite number"),
        ("rotary_scaling_factor", -2.0, "rotary_scaling_factor is -2.0; it must be positive"),
        ("variance_scaling", "false", "variance_scaling is 'false'; it must be true or false"),
        ("tie_embeddings", 1, "tie_embeddings is 1; it must be true or false"),
        ("eod_token_id", "256", "eod_token_id is '256'; it must be a whole number"),
    ],
)
def test_impossible_numbers_of_a_model(field, value, said):
    with pytest.raises(CheckpointError) as refused:
        latent(4, 4, **{field: value})
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rope_parameters", {"rope_theta": 0}, "rotary_base is 0; it must be positive"),
        ("rope_parameters", {"rope_theta": "10000"}, "rotary_base is '10000'; it must be"),
        ("rope_parameters", [1], "its config or arguments are no model's"),
        ("tie_word_embeddings", "false", "tie_embeddings is 'false'; it must be true or false"),
        ("rms_norm_eps", -1e-6, "layernorm_epsilon is -1e-06; it must be positive"),
    ],
)
def test_impossible_numbers_of_an_exported_folder(convert, tmp_path, key, value, said):
    folder = tmp_path / "exported"
    write_huggingface(RandomFolder(grouped(2)), folder, progress=False)
    write_config(folder, **{key: value})
    for argv in (("inspect", folder), ("import-hf", folder, tmp_path / "out")):
        code, error = convert(*argv)
        assert code == 2 and said in error and error.count("\n") == 1


def test_what_is_whole_opens(saved):
    assert open_checkpoint(saved).check_finite() is None
