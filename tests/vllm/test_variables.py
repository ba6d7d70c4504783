"""Environment variables of vLLM that the plugin cannot honour are refused, in one line."""

from __future__ import annotations

import subprocess

from support.vllm_cases import FEATURES
from support.vllm_environment import ENV_VLLM, PYTHON

CONFIGURE = """
import sys
from vllm.engine.arg_utils import EngineArgs
EngineArgs(model=sys.argv[1], dtype="float32").create_engine_config()
"""


def test_results_that_are_the_same_in_every_batch_are_refused(models):
    env = ENV_VLLM | {"VLLM_BATCH_INVARIANT": "1"}
    command = [str(PYTHON), "-c", CONFIGURE, str(models / FEATURES)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 1
    assert "VLLM_BATCH_INVARIANT is set, and latent attention's results depend" in done.stderr
