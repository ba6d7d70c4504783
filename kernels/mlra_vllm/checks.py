"""Checks that a model can be served, in one line, before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from vllm import envs
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils import model_arch_config_convertor as architecture

from mlra_kernels.latent_decode.validation import LATENT_DIMS, MAX_Q_LEN, ROPE_DIMS
from mlra_vllm.config import MLRAConfig, config_problems
from mlra_vllm.products import CHOICES, KEY, choice, misspelt
from mlra_vllm.shard import plan

PAGE_MULTIPLE = 16
"""The kernels take pages of a multiple of this many tokens."""
FP8 = ("fp8", "fp8_e4m3")
_OF_CACHE = (
    "num_latent_heads", "num_branches", "kv_lora_rank", "qk_rope_head_dim", "num_attention_heads",
)  # fmt: skip
"""Fields that give a cached row its form, and a step's schedule its own."""


class LatentArchitecture(architecture.ModelArchConfigConvertorBase):
    """vLLM's questions on an architecture before it builds the model: one row per token is
    cached."""

    def get_head_size(self) -> int:
        """The numbers of a cached row, without tensor parallelism.

        Raises:
            ValueError: config.json lacks a field, or contradicts itself.
        """
        for problem in config_problems(self.hf_text_config):
            raise ValueError(problem)
        return self.hf_text_config.kv_lora_rank + self.hf_text_config.qk_rope_head_dim

    def get_total_num_kv_heads(self) -> int:
        """One: the latents and the RoPE key are one row."""
        return 1


class LatentChecks(VerifyAndUpdateConfig):
    """vLLM's hook, called in the user's process when vLLM builds its configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """See `check`. `additional_config` gets the default of products. The longest sequence
        becomes the model's positions if no flag says it: for YaRN vLLM takes
        `original_max_position_embeddings * factor`, which may be more or fewer."""
        check(vllm_config)
        if isinstance(told := vllm_config.additional_config, dict):
            # vLLM keeps compiled models under a key of its configuration, which must hold the
            # choice: one that was compiled under another default would be taken.
            vllm_config.additional_config = told | {KEY: choice(vllm_config)}
        model = vllm_config.model_config
        positions = model.hf_config.max_position_embeddings
        if model.original_max_model_len is None:
            model.max_model_len = positions
        elif model.original_max_model_len == -1:  # as long as memory allows
            model.max_model_len = min(model.max_model_len, positions)


def register_checks() -> None:
    """Enter both classes into vLLM's tables; may run many times."""
    architecture.MODEL_ARCH_CONFIG_CONVERTORS["mlra"] = LatentArchitecture
    MODELS_CONFIG_MAP["MLRAForCausalLM"] = LatentChecks


def check(vllm_config: VllmConfig) -> None:
    """Check that a configuration can be served.

    Raises:
        ValueError: one line that names the value and the fix.
    """
    for problem in _problems(vllm_config):
        raise ValueError(problem)


def _problems(vllm_config: VllmConfig):
    model, cache, parallel = (
        vllm_config.model_config,
        vllm_config.cache_config,
        vllm_config.parallel_config,
    )
    config: MLRAConfig = model.hf_config
    yield from config_problems(config)
    if model.quantization is not None:
        yield (
            f"quantization {model.quantization!r} of latent attention is not there; leave"
            " --quantization out (--kv-cache-dtype fp8 makes the cache smaller)"
        )
    for key in misspelt(vllm_config):
        yield f"--additional-config names {key!r}; did you mean {KEY}?"
    if (products := choice(vllm_config)) not in CHOICES:
        yield f"products in --additional-config is {products!r}; use one of {', '.join(CHOICES)}"
    if (backend := vllm_config.attention_config.backend) is not None:
        yield (
            f"--attention-backend is {backend.name}, and latent attention has its own; leave it out"
        )
    if envs.VLLM_BATCH_INVARIANT:
        yield (
            "VLLM_BATCH_INVARIANT is set, and latent attention's results depend on the step's other"
            " tokens; unset it"
        )
    if vllm_config.lora_config is not None:
        yield "LoRA adapters of latent attention are not there; leave --enable-lora out"
    if vllm_config.kv_transfer_config is not None or cache.kv_offloading_size is not None:
        yield (
            "KV connectors and offloading do not know this cache; leave --kv-transfer-config and"
            " --kv-offloading-size out"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield (
            "context parallelism is not there for latent attention; leave"
            " --decode-context-parallel-size and --prefill-context-parallel-size at 1"
        )
    asked, positions = model.original_max_model_len, config.max_position_embeddings
    if asked is not None and asked > positions and not envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN:
        yield f"--max-model-len {asked} is more than the model's {positions} positions; lower it"
    yield from _size_problems(config, cache.block_size)
    try:
        plan(
            config.num_attention_heads,
            config.num_latent_heads,
            config.num_branches,
            parallel.tensor_parallel_size,
            0,
        )
    except ValueError as error:
        yield str(error)
    yield from _dtype_problems(model.dtype, cache.cache_dtype, cache.kv_cache_dtype_skip_layers)
    speculative = vllm_config.speculative_config
    if speculative is not None:
        yield from _speculation_problems(config, speculative)


def _speculation_problems(config: MLRAConfig, speculative: SpeculativeConfig) -> Iterator[str]:
    drafter, method = speculative.draft_model_config, speculative.method
    if method == "eagle":
        yield from _draft_problems(config, drafter.hf_config)
    latent = method == "draft_model" and drafter.hf_config.model_type == config.model_type
    if (method == "eagle" or latent) and drafter.quantization is not None:
        yield (
            f"quantization {drafter.quantization!r} of a drafter with latent attention is not"
            " there; leave quantization out of --speculative-config"
        )
    for name in _OF_CACHE if latent else ():
        theirs, ours = getattr(drafter.hf_config, name), getattr(config, name)
        if theirs != ours:
            # vLLM puts the layers of both into pages of one size, and a step has one schedule.
            yield (
                f"{name} of the drafter is {theirs} and of the served model {ours}; one cache has"
                " both, so use a drafter with the same"
            )
    if (speculative.num_speculative_tokens or 0) >= MAX_Q_LEN:
        yield (
            f"{speculative.num_speculative_tokens} speculative tokens; the kernels verify at most"
            f" {MAX_Q_LEN - 1} a step"
        )


def _draft_problems(config: MLRAConfig, draft) -> Iterator[str]:
    """Of vLLM's method `eagle`; `draft`: an EAGLEConfig around the drafter's own configuration."""
    if draft.model.model_type != config.model_type:
        yield (
            f"the drafter is a {draft.model.model_type} model; name the served model's own folder"
            " in --speculative-config, whose layer of multi-token prediction drafts"
        )
    elif not config.draft_layers:
        yield (
            "the model has no layer of multi-token prediction to draft with; use"
            ' {"method": "ngram"} in --speculative-config, or train with --mtp-num-layers 1'
        )
    elif draft.model.to_dict() != config.to_dict():
        yield (
            "the drafter is another model than the served one; name the served model's own folder"
            " in --speculative-config"
        )


def _size_problems(config: MLRAConfig, block_size: int | None):
    if config.latent_dim not in LATENT_DIMS:
        yield f"the kernels take latent dims {LATENT_DIMS}, this model has {config.latent_dim}"
    if config.qk_rope_head_dim not in ROPE_DIMS:
        yield f"the kernels take RoPE dims {ROPE_DIMS}, this model has {config.qk_rope_head_dim}"
    if "nope" in (getattr(config, "rope_layer_types", None) or ()):
        yield (
            "rope_layer_types names layers without RoPE, which are not there; use mlra generate or"
            " transformers"
        )
    if config.hidden_act not in ("silu", "swish"):
        yield f"hidden_act is {config.hidden_act!r}; only silu is there"
    if config.rope_parameters["rope_type"] not in ("default", "yarn"):
        yield f"rope_type is {config.rope_parameters['rope_type']!r}; use default or yarn"
    if block_size is not None and block_size % PAGE_MULTIPLE:
        yield (
            f"block size is {block_size}; use a multiple of {PAGE_MULTIPLE} (of 64 on Hopper, for"
            " its fast kernel)"
        )


def _dtype_problems(dtype: torch.dtype, cache_dtype: str, skipped: list[str]):
    if current_platform.is_cuda() and dtype not in (torch.bfloat16, torch.float16):
        yield f"the kernels take bfloat16 and float16, the model is {dtype}; add --dtype bfloat16"
    same = ("auto", str(dtype).removeprefix("torch."))
    if cache_dtype not in (*same, *FP8):
        yield f"--kv-cache-dtype is {cache_dtype!r}; use auto or fp8"
    if skipped and cache_dtype in FP8:
        yield "an FP8 cache holds every layer; leave --kv-cache-dtype-skip-layers out"
