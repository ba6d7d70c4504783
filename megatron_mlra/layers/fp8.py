"""Which linears run in FP8 under Transformer Engine, and which sizes FP8 can take."""

from __future__ import annotations

import copy

from megatron.core.quantization.quant_config import GlobMatcher, RecipeConfig

LOW_RANK_LINEARS = ("linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj")
"""Linears into and out of a latent, whose matrix products are too small to gain from FP8."""

FP8_RECIPES = ("delayed", "tensorwise", "blockwise")
"""Recipes that run on Hopper GPUs and newer; mxfp8 needs Blackwell."""

_BF16 = {
    "transformer_engine_config_type": "TEQuantizationParams",
    "training_recipe": {"override_quantized_autocast": True},
}


def linear_config(config, name: str):
    """The config that Transformer Engine's linear `name` of the attention is built with.

    With `fp8_linears` wide the low-rank linears get Megatron's per-module precision override to
    bf16, for their parameters too. A `quant_recipe` of the user's stays as it is.
    """
    low_rank = config.fp8_linears == "wide" and name in LOW_RANK_LINEARS
    if not config.fp8 or not low_rank or config.quant_recipe is not None:
        return config
    config = copy.copy(config)
    config.quant_recipe = RecipeConfig([GlobMatcher("*", "bf16")], {"bf16": _BF16})
    return config


def check_fp8(config) -> None:
    """Refuse what FP8 cannot take.

    Raises:
        ValueError: for a recipe that Hopper lacks, or a dim of an FP8 linear that is no multiple of
            16 on a tensor-parallel rank; the message names the next multiple.
    """
    if not config.fp8:
        return
    recipe = getattr(config.fp8_recipe, "value", config.fp8_recipe)
    if recipe not in FP8_RECIPES:
        raise ValueError(
            f"fp8_recipe is {recipe!r}; use one of {', '.join(FP8_RECIPES)} (mxfp8 needs a"
            " Blackwell GPU)"
        )
    if config.first_last_layers_bf16 and recipe == "delayed":
        raise ValueError(
            "first_last_layers_bf16 does not work with fp8_recipe 'delayed'; use tensorwise or"
            " blockwise"
        )
    tp, heads = config.tensor_model_parallel_size, config.num_attention_heads
    sizes = [
        ("hidden_size", config.hidden_size, 1),
        ("ffn_hidden_size", config.ffn_hidden_size or 4 * config.hidden_size, tp),
        ("num_attention_heads * v_head_dim", heads * config.v_head_dim, tp),
    ]
    query = ("num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)", heads * config.qk_dim)
    if config.fp8_linears == "all" or config.q_lora_rank is None:
        sizes.append((*query, tp))
    if config.fp8_linears == "all":
        sizes.append(("q_lora_rank", config.q_lora_rank or 16 * tp, tp))
        latents = config.kv_lora_rank + config.qk_rope_head_dim
        sizes.append(("kv_lora_rank + qk_rope_head_dim", latents, tp))
    for name, width, ranks in sizes:
        factor = 16 * ranks
        if width % factor:
            raise ValueError(
                f"{name} is {width}, and FP8 at tensor parallel size {tp} needs a multiple of"
                f" {factor}; use {-(-width // factor) * factor}"
            )
