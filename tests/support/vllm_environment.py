"""vLLM's own environment: its Python, and the environment variables with which tests run it."""

from __future__ import annotations

from support import ENV, ROOT

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
ENV_VLLM = ENV | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Keep every engine's scheduler in the test's process, so that tests can inspect it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # vLLM compiles small helpers with g++ even in eager mode.
    "TORCHDYNAMO_DISABLE": "1",
}
