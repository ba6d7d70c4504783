"""Engines of vLLM in its own environment, run once for all tests of this folder."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.vllm_cases import equality_jobs, feature_jobs
from support.vllm_environment import ENV_VLLM, PYTHON


@pytest.fixture(scope="session")
def models(run_driver: Callable[[str, float], Path]) -> Path:
    """The folder of the exported models, with reference.json."""
    assert PYTHON.exists(), "vLLM's environment is not there; run `make test-vllm`"
    return run_driver("vllm_reference", 600)


@pytest.fixture(scope="session")
def reference(models: Path) -> dict[str, Any]:
    """What transformers says of each case: see `support.vllm_cases.references`."""
    return json.loads((models / "reference.json").read_text())


@pytest.fixture(scope="session")
def run_jobs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run jobs of support.drivers.vllm_engine in one process of vLLM's environment."""

    def run(jobs: list[dict[str, Any]], timeout: float) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("engines")
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command = [str(PYTHON), "-m", "support.drivers.vllm_engine", str(folder)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=ENV_VLLM
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((folder / "results.json").read_text())

    return run


@pytest.fixture(scope="session")
def engines(models: Path, run_jobs: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Results of every case and feature, from one process."""
    return run_jobs(equality_jobs(models) + feature_jobs(models), 1200)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs vLLM's environment."""
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.vllm)
