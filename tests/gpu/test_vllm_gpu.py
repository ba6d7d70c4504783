"""Serving on a GPU: kernels inside vLLM, CUDA graphs, both model runners, FP8, two ranks.

Run with `pytest -m gpu tests/gpu/test_vllm_gpu.py` by a Python that has vLLM and this project's
packages. Models have random weights; what is right is what transformers computes in float32 on a
CPU for the very tokens that vLLM chose.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support import ENV
from support.vllm_cases import LENGTHS, Reference, export, prompts

HAS_VLLM = importlib.util.find_spec("vllm") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not HAS_VLLM, reason="needs vLLM in this environment"),
]
ABSORBED, EXPANDED = "MLRA-4-absorbed", "MLRA-4-gated-untied"
"""Models whose prompts attend to latents as they are, and to keys of every head."""
RUNNERS = (1, 2)
NEW = 24
CAPTURED = [1, 2, 4, 8, 16, 32, 64]
GRAPHS = {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": CAPTURED}}
NO_GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {"cudagraph_capture_sizes": CAPTURED, "cudagraph_mode": "NONE"},
}
EAGER = {"enforce_eager": True}
FOUR = prompts(150, 150, 150, 150, seed=5)
"""Prompts that are computed in one step, of more tokens than are captured, and then decode
together in a batch of a captured size: no step is padded."""
PIECES = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
TOLERANCE = {"auto": 0.05, "fp8": 0.1}
"""Of a log-probability, in bfloat16 against float32."""


def job(name: str, model: str, batch: list[list[int]], **options: Any) -> dict[str, Any]:
    """One engine for support.drivers.vllm_engine."""
    settings = {"dtype": "bfloat16", "block_size": 64, "gpu_memory_utilization": 0.5}
    return {
        "name": name,
        "case": model,
        "batches": [batch],
        "new": NEW,
        "scores": "fp8" in name or "mixed" in name,
        "options": settings | {"kv_cache_memory_bytes": 256 << 20} | options,
    }


JOBS = {
    1: [
        job("graphs", ABSORBED, FOUR, **GRAPHS),
        job("no graphs", ABSORBED, FOUR, **NO_GRAPHS),
        job("mixed", ABSORBED, prompts(*LENGTHS), **GRAPHS, **PIECES),
    ],
    2: [
        job("graphs", ABSORBED, FOUR, **GRAPHS),
        job("no graphs", ABSORBED, FOUR, **NO_GRAPHS),
        job("mixed", ABSORBED, prompts(*LENGTHS), **GRAPHS, **PIECES),
        job("mixed expanded", EXPANDED, prompts(*LENGTHS), **EAGER, **PIECES),
        job("fp8", ABSORBED, prompts(*LENGTHS), kv_cache_dtype="fp8", **GRAPHS),
        job("mixed MLA", "MLA", prompts(*LENGTHS), **EAGER, **PIECES),
        job("mixed GLA-2", "GLA-2", prompts(*LENGTHS), **EAGER, **PIECES),
        job("mixed MLRA-2", "MLRA-2", prompts(*LENGTHS), **EAGER, **PIECES),
        job("llama", "GQA", prompts(*LENGTHS), **EAGER),
    ],
}
TWO_RANKS = [
    job(f"two ranks {model}", model, prompts(*LENGTHS), tensor_parallel_size=2, **GRAPHS)
    for model in (ABSORBED, "MLA")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The exported models."""
    path = tmp_path_factory.mktemp("exported")
    for name in {each["case"] for jobs in (*JOBS.values(), TWO_RANKS) for each in jobs}:
        export(name, path / name)
    return path


@pytest.fixture(scope="module")
def engines(folder):
    """Results of a runner's jobs, by their names; run once."""

    @functools.cache
    def run(runner: int, ranks: int = 1) -> dict[str, Any]:
        jobs = TWO_RANKS if ranks == 2 else JOBS[runner]
        where = folder / f"runner {runner} of {ranks}"
        where.mkdir()
        jobs = [each | {"model": str(folder / each["case"])} for each in jobs]
        (where / "jobs.json").write_text(json.dumps(jobs))
        env = ENV | {
            "VLLM_USE_V2_MODEL_RUNNER": str(runner - 1),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "support.drivers.vllm_engine", str(where)]
        done = subprocess.run(command, env=env, timeout=540, stderr=subprocess.STDOUT)
        assert done.returncode == 0
        return json.loads((where / "results.json").read_text())

    return run


@functools.cache
def _reference(path: Path) -> Reference:
    return Reference(path)


def check(folder: Path, job: dict[str, Any], result: dict[str, Any], cache: str = "auto") -> None:
    """Every log-probability near the reference's, every token as good as its likeliest."""
    assert "error" not in result, result
    (batch,) = result["batches"]
    model, limit = _reference(folder / job["case"]).model, TOLERANCE[cache]
    for prompt, tokens, found in zip(
        job["batches"][0], batch["tokens"], batch["log_probs"], strict=True
    ):
        assert len(tokens) == NEW
        whole = torch.tensor([prompt + tokens])
        with torch.no_grad():
            rows = model(whole).logits[0, :-1].log_softmax(-1)
        chosen = rows.gather(1, whole[0, 1:, None])[:, 0]
        chosen_new, best = chosen[-NEW:], rows[-NEW:].max(-1).values
        assert float((best - chosen_new).max()) < 2 * limit
        expected = chosen[-len(found) :]
        worst = float((expected - torch.tensor(found)).abs().max())
        assert worst < limit, f"log-probability off by {worst}"


@pytest.mark.parametrize("runner", RUNNERS)
def test_decoding_steps_are_one_graph_and_prompts_several(runner, engines):
    assert engines(runner)["graphs"]["graphs"] == "FULL_AND_PIECEWISE"


@pytest.mark.parametrize("runner", RUNNERS)
def test_captured_steps_equal_others_bitwise(runner, engines):
    captured, others = (engines(runner)[name]["batches"][0] for name in ("graphs", "no graphs"))
    assert captured["tokens"] == others["tokens"]
    assert captured["log_probs"] == others["log_probs"]


@pytest.mark.parametrize(
    ("runner", "name"),
    [(runner, each["name"]) for runner, jobs in JOBS.items() for each in jobs],
)
def test_tokens_are_those_of_the_reference(runner, name, engines, folder):
    (job,) = [each for each in JOBS[runner] if each["name"] == name]
    check(folder, job, engines(runner)[name], "fp8" if name == "fp8" else "auto")


def test_prompts_came_in_pieces_beside_decoding_sequences(engines):
    steps = engines(2)["mixed"]["batches"][0]["steps"]
    assert max(map(sum, steps)) <= 64
    assert len([step for step in steps if 1 in step and max(step) > 1]) >= 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("job", TWO_RANKS, ids=lambda job: job["case"])
def test_two_ranks(job, engines, folder):
    check(folder, job, engines(2, 2)[job["name"]])
