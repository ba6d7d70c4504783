"""A model's configuration in vLLM: environment variables that the plugin cannot honour are refused
in one line; the choice of products is a part of the key of compiled models."""

from __future__ import annotations

import subprocess

import pytest

from support.vllm_cases import FEATURES
from support.vllm_environment import ENV_VLLM, PYTHON

CONFIGURE = """
import os, sys
from vllm.engine.arg_utils import EngineArgs
arguments = EngineArgs(model=sys.argv[1], dtype="float32")
print(arguments.create_engine_config().additional_config)
for key in sys.argv[2:]:
    arguments.additional_config = {key: "cublas"}
    try:
        print(arguments.create_engine_config().additional_config)
    except ValueError as error:
        print(error)
arguments.additional_config = {}
os.environ["VLLM_BATCH_INVARIANT"] = "1"
arguments.create_engine_config()
"""
NEAR = "prodcts", "product", "prodcuts", "Products"
FAR = "projects", "producers", "model", ""
"""Keys that are typing errors of the plugin's own, and such as another plugin may have."""


@pytest.fixture(scope="module")
def configured(models) -> subprocess.CompletedProcess:
    """A process that makes vLLM's configuration, prints its `additional_config`, and makes it again
    with VLLM_BATCH_INVARIANT set."""
    command = [str(PYTHON), "-c", CONFIGURE, str(models / FEATURES), *NEAR, *FAR]
    return subprocess.run(command, capture_output=True, text=True, env=ENV_VLLM, timeout=300)


def test_the_default_of_products_is_a_part_of_the_key_of_compiled_models(configured):
    # vLLM's key has additional_config, and not the code that chooses.
    assert "{'products': 'auto'}" in configured.stdout.splitlines(), configured.stderr[-2000:]


def test_a_key_that_is_nearly_the_plugins_own_is_refused(configured):
    for key in NEAR:
        assert f"--additional-config names {key!r}; did you mean products?" in configured.stdout
    for key in FAR:
        assert str({key: "cublas", "products": "auto"}) in configured.stdout


def test_results_that_are_the_same_in_every_batch_are_refused(configured):
    assert configured.returncode == 1
    said = "VLLM_BATCH_INVARIANT is set, and latent attention's results depend"
    assert said in configured.stderr
