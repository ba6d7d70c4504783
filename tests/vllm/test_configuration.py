"""A model's configuration in vLLM: environment variables that the plugin cannot honour are refused
in one line; the choice of products is a part of the key of compiled models."""

from __future__ import annotations

import subprocess

from support.vllm_cases import FEATURES
from support.vllm_environment import ENV_VLLM, PYTHON

CONFIGURE = """
import sys
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(model=sys.argv[1], dtype="float32").create_engine_config()
print(config.additional_config)
"""


def configured(models, **variables: str) -> subprocess.CompletedProcess:
    """A process that makes vLLM's configuration and prints its `additional_config`."""
    command = [str(PYTHON), "-c", CONFIGURE, str(models / FEATURES)]
    env = ENV_VLLM | variables
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def test_results_that_are_the_same_in_every_batch_are_refused(models):
    done = configured(models, VLLM_BATCH_INVARIANT="1")
    assert done.returncode == 1
    assert "VLLM_BATCH_INVARIANT is set, and latent attention's results depend" in done.stderr


def test_the_default_of_products_is_a_part_of_the_key_of_compiled_models(models):
    # vLLM's key has additional_config, and not the code that chooses.
    done = configured(models)
    assert done.stdout.splitlines()[-1] == "{'products': 'auto'}", done.stderr[-2000:]
