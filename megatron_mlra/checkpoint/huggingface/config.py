"""`config.json` of exported folders: model_type `mlra`, or `llama` for grouped queries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_mlra.description.model import CheckpointError, ModelDescription

AUTO_MAP = {
    "AutoConfig": "configuration_mlra.MLRAConfig",
    "AutoModel": "modeling_mlra.MLRAModel",
    "AutoModelForCausalLM": "modeling_mlra.MLRAForCausalLM",
}
"""Which class of the exported code transformers loads for each of its own."""

_COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "tie_word_embeddings": "tie_embeddings",
}
_LATENT = (
    "num_latent_heads",
    "num_branches",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "output_gate",
    "variance_scaling",
    "softmax_scale",
)
_EXPERTS = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "scoring_func": "moe_router_score_function",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
    "use_expert_bias": "moe_router_enable_expert_bias",
}
AHEAD = "num_nextn_predict_layers"
"""Layers of multi-token prediction, in DeepSeek-V3's words."""
_DEPTHS = "num_nextn_predict_depths"
"""Tokens that one such layer predicts, where it does for all of them."""
_MLP_TYPES = ("dense", "sparse")
_ROPE_TYPES = ("rope", "nope")
_ROUTER_DTYPES = {None: None, "fp32": "float32"}
_YARN = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def to_hf_config(model: ModelDescription) -> dict[str, Any]:
    """The `config.json` of a model.

    Raises:
        CheckpointError: a model with grouped queries that transformers' Llama cannot express.
    """
    config: dict[str, Any] = {theirs: getattr(model, ours) for theirs, ours in _COMMON.items()}
    config |= {"hidden_act": "silu", "dtype": model.dtype, "rope_parameters": _rope(model)}
    config |= {"bos_token_id": None, "eos_token_id": model.eod_token_id}
    if model.attention == "mlra":
        return config | {
            "model_type": "mlra",
            "architectures": ["MLRAForCausalLM"],
            "auto_map": AUTO_MAP,
            **{name: getattr(model, name) for name in _LATENT},
            "query_head_norm": model.query_head_norm,
            "rope_layer_types": [_ROPE_TYPES[bit] for bit in model.no_rope_pattern] or None,
            **_experts(model),
            **_ahead(model),
        }
    _check_llama(model)
    return config | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "attention_bias": False,
        "mlp_bias": False,
    }


def from_hf_config(config: Mapping[str, Any], dtype: str) -> ModelDescription:
    """The model that a `config.json` of type `mlra` or `llama` describes.

    Raises:
        CheckpointError: a key is missing, or its value has no counterpart in ModelDescription.
    """

    def needed(name: str) -> Any:
        if name not in config:
            raise CheckpointError(f"config.json names no {name}")
        return config[name]

    fields: dict[str, Any] = {ours: needed(theirs) for theirs, ours in _COMMON.items()}
    eos = config.get("eos_token_id")
    first = next(iter(eos), None) if isinstance(eos, list) else eos
    fields |= {"dtype": dtype, "eod_token_id": first}
    for name, allowed in (
        ("hidden_act", ("silu", "swish")),
        ("attention_bias", (False,)),
        ("mlp_bias", (False,)),
    ):
        if config.get(name, allowed[0]) not in allowed:
            raise CheckpointError(
                f"config.json: {name} {config[name]!r} has no counterpart; only {allowed[0]!r} has"
            )
    fields |= _rope_fields(config.get("rope_parameters") or {"rope_theta": 10000.0})
    if config.get("model_type") == "mlra":
        fields |= {name: needed(name) for name in _LATENT}
        # Folders that were exported before there was such a norm do not name it.
        fields["query_head_norm"] = config.get("query_head_norm", False)
        fields["no_rope_pattern"] = _no_rope_pattern(
            config.get("rope_layer_types"), fields["num_layers"]
        )
        if config.get("num_experts"):
            fields |= _expert_fields(config, needed)
        fields |= _ahead_fields(config)
        model = ModelDescription(attention="mlra", **fields)
        if problem := model.routing_problem():
            raise CheckpointError(problem)
        return model
    heads = fields["num_attention_heads"]
    return ModelDescription(
        attention="gqa",
        num_query_groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or fields["hidden_size"] // heads,
        **fields,
    )


def _no_rope_pattern(types: Any, num_layers: Any) -> tuple[int, ...]:
    if types is None:
        return ()
    listed = isinstance(types, list) and all(kind in _ROPE_TYPES for kind in types)
    if not listed or len(types) != num_layers:
        raise CheckpointError(
            f"config.json: rope_layer_types is {types!r:.60}; name {' or '.join(_ROPE_TYPES)} for"
            f" each of {num_layers!r:.20} layers"
        )
    pattern = tuple(map(_ROPE_TYPES.index, types))
    return pattern if any(pattern) else ()


def _experts(model: ModelDescription) -> dict[str, Any]:
    """The keys of a mixture of experts."""
    if not model.num_experts:
        return {}
    return {theirs: getattr(model, ours) for theirs, ours in _EXPERTS.items()} | {
        "mlp_layer_types": [_MLP_TYPES[is_moe] for is_moe in model.moe_layer_pattern],
        "norm_topk_prob": model.normalizes_topk,
        "router_dtype": _ROUTER_DTYPES[model.moe_router_dtype],
    }


def _expert_fields(config: Mapping[str, Any], needed: Callable[[str], Any]) -> dict[str, Any]:
    fields = {ours: needed(theirs) for theirs, ours in _EXPERTS.items()}
    types = config.get("mlp_layer_types") or ["sparse"] * needed("num_hidden_layers")
    dtypes = {theirs: ours for ours, theirs in _ROUTER_DTYPES.items()}
    for name, value, allowed in (
        *(("mlp_layer_types", kind, _MLP_TYPES) for kind in types),
        ("router_dtype", config.get("router_dtype"), tuple(dtypes)),
    ):
        if value not in allowed:
            raise CheckpointError(
                f"config.json: {name} {value!r} has no counterpart; {allowed} have"
            )
    normalizes = needed("norm_topk_prob")
    if not isinstance(normalizes, bool):
        raise CheckpointError(f"config.json: norm_topk_prob is {normalizes!r}; use true or false")
    softmax = fields["moe_router_score_function"] == "softmax"
    if not softmax and normalizes != (fields["moe_router_topk"] > 1):
        raise CheckpointError(
            f"config.json: norm_topk_prob {normalizes} with sigmoid scores and"
            f" {fields['moe_router_topk']} experts a token has no counterpart in Megatron"
        )
    return fields | {
        "moe_layer_pattern": tuple(map(_MLP_TYPES.index, types)),
        "moe_router_pre_softmax": softmax and not normalizes,
        "moe_router_dtype": dtypes[config.get("router_dtype")],
    }


def _ahead(model: ModelDescription) -> dict[str, Any]:
    """The keys of multi-token prediction."""
    if not model.mtp_num_layers:
        return {}
    repeats = {_DEPTHS: model.mtp_num_layers} if model.mtp_use_repeated_layer else {}
    return {AHEAD: model.draft_layers, **repeats}


def _ahead_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    layers, depths = config.get(AHEAD) or 0, config.get(_DEPTHS)
    for name, value in ((AHEAD, layers), (_DEPTHS, depths or 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(
                f"config.json: {name} is {value!r:.60}; it must be a whole number of at least 0"
            )
    if not depths:
        return {"mtp_num_layers": layers}
    if layers != 1:
        raise CheckpointError(
            f"config.json: {_DEPTHS} is {depths}, which needs {AHEAD} 1, and that is {layers}"
        )
    return {"mtp_num_layers": depths, "mtp_use_repeated_layer": True}


def _rope(model: ModelDescription) -> dict[str, Any]:
    """transformers' `rope_parameters`."""
    if model.rope_type == "rope":
        return {"rope_type": "default", "rope_theta": float(model.rotary_base)}

    def magnitude(mscale: float) -> float:
        factor = model.rotary_scaling_factor
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return {
        "rope_type": "yarn",
        "rope_theta": float(model.rotary_base),
        "factor": model.rotary_scaling_factor,
        **{name: getattr(model, name) for name in _YARN},
        # Given explicitly, since transformers treats mscale_all_dim 0 as "not given".
        "attention_factor": magnitude(model.mscale) / magnitude(model.mscale_all_dim),
    }


def _rope_fields(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    fields = {"rotary_base": rope.get("rope_theta", 10000.0)}
    if kind == "default":
        return fields
    if kind != "yarn":
        raise CheckpointError(f"config.json: rope_type {kind!r} has no counterpart; only yarn has")
    missing = [name for name in ("factor", *_YARN) if name not in rope]
    if missing:
        raise CheckpointError(f"config.json: rope_parameters name no {', '.join(missing)}")
    fields |= {"rope_type": "yarn", "rotary_scaling_factor": rope["factor"]}
    return fields | {name: rope[name] for name in _YARN}


def _check_llama(model: ModelDescription) -> None:
    """Refuse a model that transformers' Llama cannot express."""
    if model.num_experts:
        raise CheckpointError(
            f"a {model.variant} model has no Hugging Face counterpart: Llama has no experts"
        )
    if model.output_gate:
        raise CheckpointError(
            f"a {model.variant} model has no Hugging Face counterpart: Llama has no output gate;"
            " use export-official"
        )
    if not math.isclose(model.softmax_scale, model.head_dim**-0.5):
        raise CheckpointError(
            f"softmax_scale is {model.softmax_scale}, and Llama's is head_dim^-1/2, which is"
            f" {model.head_dim**-0.5:.6g}"
        )
    if model.hidden_size % model.num_attention_heads:
        raise CheckpointError(
            f"hidden_size {model.hidden_size} is no multiple of num_attention_heads"
            f" {model.num_attention_heads}, which transformers' Llama needs"
        )
