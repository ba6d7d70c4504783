"""vLLM's own environment: where its Python is, and with which variables tests run it."""

from __future__ import annotations

from support import ENV, ROOT

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
ENV_VLLM = {name: value for name, value in ENV.items() if name != "PYTHONDONTWRITEBYTECODE"} | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Every engine's scheduler is in the test's process, where it can be watched.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # vLLM compiles small helpers with g++ even in eager mode.
    "TORCHDYNAMO_DISABLE": "1",
}
