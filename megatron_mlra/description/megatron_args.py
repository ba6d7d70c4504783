"""A model's description from and to the arguments that a Megatron run saves with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_mlra.description.experts import expert_args, expert_fields
from megatron_mlra.description.model import YARN, CheckpointError, ModelDescription


def from_megatron_args(args: Any, **overrides: Any) -> ModelDescription:
    """The model that a Megatron run's arguments (a namespace or mapping) describe.

    `overrides` are fields of ModelDescription and win.

    Raises:
        CheckpointError: for arguments of a model that cannot be described, named.
    """
    return ModelDescription(**description_fields(args) | overrides)


def description_fields(args: Any) -> dict[str, Any]:
    """Fields of ModelDescription from a run's arguments (a namespace or mapping).

    Raises:
        CheckpointError: for arguments of a model that cannot be described, named.
    """
    values = dict(args) if isinstance(args, Mapping) else dict(vars(args))
    _refuse_unsupported(values)

    def needed(name: str) -> Any:
        if values.get(name) is None:
            raise CheckpointError(f"the checkpoint's arguments name no {name}")
        return values[name]

    heads = needed("num_attention_heads")
    fields: dict[str, Any] = {
        name: needed(name) for name in ("num_layers", "hidden_size", "ffn_hidden_size")
    }
    fields |= {
        "num_attention_heads": heads,
        "vocab_size": values.get("vocab_size") or needed("padded_vocab_size"),
        "rotary_base": float(values.get("rotary_base", 10000)),
        "layernorm_epsilon": float(needed("layernorm_epsilon")),
        "tie_embeddings": not values.get("untie_embeddings_and_output_weights", False),
        "max_position_embeddings": needed("max_position_embeddings"),
        "dtype": str(values.get("params_dtype", "float32")).removeprefix("torch."),
        "softmax_scale": values.get("softmax_scale"),
        "tokenizer_type": values.get("tokenizer_type"),
        "tokenizer_model": values.get("tokenizer_model"),
        "eod_token_id": values.get("null_tokenizer_eod_id"),
    }
    try:
        fields |= expert_fields(values, fields["num_layers"])
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if values.get("attention") == "mlra":
        fields |= {
            "attention": "latent",
            "qk_nope_head_dim": needed("qk_head_dim"),
            "qk_rope_head_dim": needed("qk_pos_emb_head_dim"),
            "q_lora_rank": values.get("q_lora_rank"),
            "output_gate": bool(values.get("output_gate")),
            "variance_scaling": bool(values.get("variance_scaling", True)),
            "rope_type": values.get("rope_type") or "rope",
        }
        for name in ("num_latent_heads", "num_branches", "kv_lora_rank", "v_head_dim"):
            fields[name] = needed(name)
        for name in YARN:
            if values.get(name) is not None:
                fields[name] = values[name]
    else:
        groups = values.get("num_query_groups") if values.get("group_query_attention") else None
        fields |= {
            "attention": "gqa",
            "num_query_groups": groups or heads,
            "head_dim": values.get("kv_channels") or fields["hidden_size"] // heads,
            "output_gate": bool(values.get("attention_output_gate")),
        }
    return fields


def to_megatron_args(description: ModelDescription) -> dict[str, Any]:
    """The arguments that `pretrain_mlra.py` builds this model from; no layout, no training.

    `params_dtype` stays text, and `padded_vocab_size` is the writer's to choose.
    """
    args: dict[str, Any] = {
        name: getattr(description, name)
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "vocab_size",
            "rotary_base",
            "layernorm_epsilon",
            "max_position_embeddings",
            "tokenizer_model",
        )
    }
    if float(description.rotary_base).is_integer():
        args["rotary_base"] = int(description.rotary_base)
    args |= {
        "attention": "mlra" if description.attention == "latent" else "gqa",
        "encoder_num_layers": description.num_layers,
        "seq_length": description.max_position_embeddings,
        "untie_embeddings_and_output_weights": not description.tie_embeddings,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "tokenizer_type": description.tokenizer_type or "NullTokenizer",
        "null_tokenizer_eod_id": description.eod_token_id,
        "params_dtype": description.dtype,
        "bf16": description.dtype == "bfloat16",
        "fp16": description.dtype == "float16",
        "softmax_scale": description.softmax_scale,
        **expert_args(description),
    }
    if description.attention == "gqa":
        return args | {
            "group_query_attention": description.num_query_groups
            != description.num_attention_heads,
            "num_query_groups": description.num_query_groups,
            "kv_channels": description.head_dim,
            "attention_output_gate": description.output_gate,
        }
    names = ("num_latent_heads", "num_branches", "q_lora_rank", "kv_lora_rank", "v_head_dim")
    args |= {
        name: getattr(description, name) for name in (*names, "variance_scaling", "output_gate")
    }
    args |= {name: getattr(description, name) for name in YARN}
    return args | {
        "qk_head_dim": description.qk_nope_head_dim,
        "qk_pos_emb_head_dim": description.qk_rope_head_dim,
        "rope_type": None if description.rope_type == "rope" else description.rope_type,
        "kv_channels": description.v_head_dim,
        "num_query_groups": 1,
        "group_query_attention": False,
        "attention_output_gate": False,
    }


_NEEDED = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "softmax_type": "vanilla",
}
_REFUSED = (
    "qk_layernorm",
    "mtp_num_layers",
    "rotary_interleaved",
    "use_rope_scaling",
    "no_rope_freq",
    "window_size",
    "multi_latent_attention",
    "apply_residual_connection_post_layernorm",
    "layernorm_zero_centered_gamma",
    "apply_layernorm_1p",
)


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    kind = values.get("attention")
    if kind not in ("mlra", "gqa"):
        raise CheckpointError(
            f"attention {kind!r} cannot be converted; mlra and gqa (MHA, MQA, GQA) can"
        )
    for name, needed in _NEEDED.items():
        value = values.get(name)
        if value is not None and value != needed:
            raise CheckpointError(f"{name} {value!r} cannot be converted; only {needed!r} can")
    for name in _REFUSED:
        if values.get(name):
            raise CheckpointError(f"a model with {name} ({values[name]!r}) cannot be converted")
