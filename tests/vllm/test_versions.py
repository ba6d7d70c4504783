"""Another version of vLLM: the models of this family are refused, in one line."""

from __future__ import annotations

import subprocess

from support.vllm_cases import FEATURES
from support.vllm_environment import ENV_VLLM, PYTHON

OPEN = """
import sys
from mlra_vllm.plugin import register
register()
register()
from transformers import AutoConfig
try:
    print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)
except ValueError as error:
    print(error)
"""


def opened(folder, version: str, path) -> str:
    """What a process says that has `version` of vLLM installed and opens an exported model."""
    about = path / f"vllm-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    env = ENV_VLLM | {"PYTHONPATH": f"{path}:{ENV_VLLM['PYTHONPATH']}"}
    command = [str(PYTHON), "-c", OPEN, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_a_version_that_is_not_tested_is_refused_in_one_line(models, tmp_path):
    said = opened(models / FEATURES, "0.27.1", tmp_path)
    assert said == (
        "mlra_vllm is made for vLLM 0.26.0 and this is 0.27.1, whose internals differ;"
        " pip install vllm==0.26.0"
    )


def test_a_patch_of_the_tested_version_is_taken(models, tmp_path):
    # vLLM takes a build without "cpu" in its version for one of a GPU, whose library needs AVX-512.
    assert opened(models / FEATURES, "0.26.9+cpu", tmp_path) == "MLRAConfig"
