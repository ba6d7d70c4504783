"""Layer specifications: Megatron's own blocks with this project's attention and norms.

Layers of `transformer_impl` local run everywhere (torch), of transformer_engine on NVIDIA GPUs.
"""

from __future__ import annotations

import copy

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_layer_specs,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_mlra.layers.attention import MLRASelfAttention
from megatron_mlra.layers.baselines.attention import baseline_attention_spec
from megatron_mlra.layers.baselines.config import BaselineConfig
from megatron_mlra.layers.config import MLRAConfig, resolve_core_backend
from megatron_mlra.layers.core_attention import LatentCoreAttention, SDPACoreAttention
from megatron_mlra.layers.projections import RMSNorm
from megatron_mlra.layers.submodules import attention_submodules


def mlra_attention_spec(config: MLRAConfig) -> ModuleSpec:
    """MLRASelfAttention with the linears of `config.transformer_impl` and the core of
    `config.core_backend`.

    Raises:
        ValueError: if a requested backend is not installed, or does not support this model's
            sizes.
    """
    use_te = uses_transformer_engine(config)
    return ModuleSpec(
        module=MLRASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=attention_submodules(use_te, _core_attention(config)),
    )


def _core_attention(config: MLRAConfig):
    backend = core_backend(config)
    if backend == "te":
        from megatron_mlra.layers.transformer_engine import te_core_attention

        return te_core_attention
    return LatentCoreAttention if backend == "mlra_kernels" else SDPACoreAttention


def core_backend(config: MLRAConfig) -> str:
    """The core that `config.core_backend` resolves to: 'torch', 'te' or 'mlra_kernels'.

    Raises:
        ValueError: if a requested backend is not installed, or does not support this model's sizes.
    """
    backend = resolve_core_backend(config.core_backend, config.transformer_impl)
    if backend == "te" and not HAVE_TE:
        raise ValueError(
            "core_backend te needs Transformer Engine, which is not installed; install the extra"
            " megatron-mlra[te] or use core_backend torch"
        )
    if backend == "mlra_kernels" and (misfit := _latent_core_misfit(config)):
        raise ValueError(f"core_backend mlra_kernels {misfit}, or core_backend auto")
    if backend == "te" and config.core_backend == "auto" and not _latent_core_misfit(config):
        return "mlra_kernels"
    return backend


def _latent_core_misfit(config: MLRAConfig) -> str | None:
    """Why the kernels of the absorbed core cannot run, and what to use; None where they can."""
    from mlra_kernels.latent_attention import misfit

    for wrong, said in (
        (not config.absorbed, "attends in latent space; use core_form absorbed"),
        (
            config.attention_dropout,
            f"has no dropout and attention_dropout is {config.attention_dropout}; use 0",
        ),
        (not (config.bf16 or config.fp16), "computes in bf16 or fp16; use one of them"),
        (
            config.deterministic_mode,
            "sums gradients in any order and deterministic_mode is on; use core_backend te",
        ),
        (
            config.fp8_dot_product_attention,
            "has no FP8 and fp8_dot_product_attention is on; use core_backend te",
        ),
    ):
        if wrong:
            return said
    return misfit(config.latent_dim, config.qk_rope_head_dim)


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One transformer layer of any attention kind this project has; mixture-of-experts if the
    config has experts, else dense."""
    kind = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
        "multi_latent_attention": config.multi_latent_attention,
    }
    if uses_transformer_engine(config):
        spec = get_gpt_layer_with_transformer_engine_spec(**kind)
    else:
        spec = get_gpt_layer_local_spec(**kind, normalization=config.normalization)
    return _adapt(spec, config, is_moe=config.num_moe_experts is not None)


def block_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, dense or mixture-of-experts as `moe_layer_freq` says.

    With more than one stage, Megatron's parallel state must be initialised, as it holds the stage.

    Raises:
        ValueError: `transformer_impl` is unknown, or Transformer Engine is not installed.
    """
    specs = get_gpt_decoder_layer_specs(
        config, uses_transformer_engine(config), normalization=config.normalization
    )
    dense, moe = (_adapt(_first(specs, config, m), config, is_moe=m) for m in (False, True))
    layers = [moe if is_moe else dense for is_moe in _moe_pattern(config)]
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        layers = [layers[i] for i in layout.get_layer_id_list(vp_stage=vp_stage)]
    elif config.pipeline_model_parallel_size > 1:
        offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
        layers = layers[offset : offset + get_num_layers_to_build(config, vp_stage=vp_stage)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm_class(config))


def last_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """The specification of the decoder's last layer."""
    specs = get_gpt_decoder_layer_specs(
        config, uses_transformer_engine(config), normalization=config.normalization
    )
    is_moe = _moe_pattern(config)[-1]
    return _adapt(_first(specs, config, is_moe), config, is_moe)


def _moe_pattern(config: TransformerConfig) -> list[bool]:
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    freq = config.moe_layer_freq
    if isinstance(freq, int):
        return [i % freq == 0 for i in range(config.num_layers)]
    return [bool(is_moe) for is_moe in freq]


def _first(specs: list[ModuleSpec], config: TransformerConfig, is_moe: bool) -> ModuleSpec | None:
    """Megatron's specification of the first layer of this kind; None if no layer is."""
    pairs = zip(specs, _moe_pattern(config), strict=True)
    return next((spec for spec, moe in pairs if moe == is_moe), None)


def _adapt(spec: ModuleSpec | None, config: TransformerConfig, is_moe: bool) -> ModuleSpec | None:
    """A copy of a Megatron layer specification with this project's attention and norms.

    Transformer Engine fuses some norms into the linear behind the norm. Checkpoints store those
    norms under the fused names, whatever `transformer_impl` is.
    """
    if spec is None:
        return None
    spec = copy.deepcopy(spec)
    layer = spec.submodules
    stored = {} if is_moe else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if isinstance(config, MLRAConfig):
        layer.self_attention = mlra_attention_spec(config)
        layer.input_layernorm = norm_class(config)
    elif isinstance(config, BaselineConfig) and config.attention != "gqa":
        layer.self_attention = baseline_attention_spec(config)
        layer.input_layernorm = norm_class(config)
    else:
        stored["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if not uses_transformer_engine(config):
        layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
        layer.sharded_state_dict_keys_map = stored
    return spec


def norm_class(config: TransformerConfig) -> type:
    """The class of the norms of replicated hidden states."""
    if uses_transformer_engine(config):
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return RMSNorm


def uses_transformer_engine(config: TransformerConfig) -> bool:
    """Whether layers are made of Transformer Engine's modules.

    Raises:
        ValueError: `transformer_impl` is unknown, or Transformer Engine is not installed.
    """
    if config.transformer_impl == "transformer_engine":
        if not HAVE_TE:
            raise ValueError(
                "transformer_impl transformer_engine needs Transformer Engine, which is not"
                " installed; install the extra megatron-mlra[te] or use transformer_impl local"
            )
        return True
    if config.transformer_impl != "local":
        raise ValueError(
            f"transformer_impl is {config.transformer_impl!r}; use local or transformer_engine"
        )
    return False
