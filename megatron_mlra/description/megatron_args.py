"""Conversion between a model's description and the arguments that a Megatron run saves."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from megatron_mlra.description.experts import expert_args, expert_fields, refused_experts
from megatron_mlra.description.model import MOST_LAYERS, YARN, CheckpointError, ModelDescription


def from_megatron_args(args: Any, **overrides: Any) -> ModelDescription:
    """The model that a run's arguments, a preset (a mapping) or a Megatron config describes.

    Names are Megatron's (`qk_head_dim`, `padded_vocab_size`, `num_experts`, ...). Without
    `padded_vocab_size` the embedding is padded by Megatron's rule. `check_convertible` tells
    whether checkpoints of the model can be converted.

    Args:
        overrides: fields of ModelDescription that replace those of `args`.

    Raises:
        CheckpointError: the arguments describe no model; the line names one of them.
    """
    values = _mapping(args)

    def get(*names: str, default: Any = None) -> Any:
        return next((values[name] for name in names if values.get(name) is not None), default)

    def switch(*names: str, default: bool = False) -> bool:
        value = get(*names, default=default)
        if not isinstance(value, bool):  # a text "false" would count as true
            raise CheckpointError(f"{names[0]} is {value!r:.60}; it must be true or false")
        return value

    kind = get("attention", default="mlra" if get("num_latent_heads") else "gqa")
    kind = overrides.get("attention", kind)
    d, h = get("hidden_size", default=0), get("num_attention_heads", default=0)
    swiglu = switch("swiglu", "gated_linear_unit")
    ffn = get("ffn_hidden_size", default=(d * 8 // 3) // 64 * 64 if swiglu else 4 * d)
    tied = switch("share_embeddings_and_output_weights", default=True)
    if values.get("untie_embeddings_and_output_weights") is not None:
        tied = not switch("untie_embeddings_and_output_weights")
    fields: dict[str, Any] = {
        "attention": kind,
        "num_layers": get("num_layers", default=0),
        "hidden_size": d,
        "ffn_hidden_size": ffn,
        "num_attention_heads": h,
        "vocab_size": get("vocab_size", "padded_vocab_size", default=0),
        "padded_vocab_size": get("padded_vocab_size") or _padded(values),
        "seq_length": get("seq_length", default=0),
        "mtp_num_layers": get("mtp_num_layers", default=0),
        "mtp_use_repeated_layer": switch("mtp_use_repeated_layer"),
        "swiglu": swiglu,
        "tie_embeddings": tied,
        "rotary_base": float(get("rotary_base", default=10000)),
        "layernorm_epsilon": float(get("layernorm_epsilon", "norm_epsilon", default=1e-5)),
        "max_position_embeddings": get("max_position_embeddings", "seq_length", default=2048),
        "dtype": str(get("params_dtype", default="float32")).removeprefix("torch."),
        "softmax_scale": get("softmax_scale"),
        "no_rope_pattern": _no_rope_pattern(get("no_rope_freq"), get("num_layers", default=0)),
        "tokenizer_type": get("tokenizer_type"),
        "tokenizer_model": get("tokenizer_model"),
        "eod_token_id": get("null_tokenizer_eod_id"),
    }
    if kind == "mlra":
        fields |= {
            "num_latent_heads": get("num_latent_heads", default=4),
            "num_branches": get("num_branches", default=4),
            "q_lora_rank": get("q_lora_rank"),
            "kv_lora_rank": get("kv_lora_rank", default=0),
            "qk_nope_head_dim": get("qk_head_dim", "qk_nope_head_dim", default=128),
            "qk_rope_head_dim": get("qk_pos_emb_head_dim", "qk_rope_head_dim", default=64),
            "v_head_dim": get("v_head_dim", default=128),
            "query_head_norm": switch("query_head_norm"),
            "output_gate": switch("output_gate"),
            "variance_scaling": switch("variance_scaling", default=True),
            "rope_type": get("rope_type", default="rope"),
            "core_form": get("core_form", default="auto"),
        }
        fields |= {name: values[name] for name in YARN if values.get(name) is not None}
    else:
        grouped = switch("group_query_attention", default=True)
        fields |= {
            "num_query_groups": get("num_query_groups", default=h) if grouped else h,
            "head_dim": get("kv_channels", default=d // h if h else 0),
        }
        if kind == "gqa":
            fields["output_gate"] = switch("attention_output_gate")
            fields["qk_layernorm"] = switch("qk_layernorm")
        elif kind == "gta":
            fields["qk_rope_head_dim"] = get("qk_pos_emb_head_dim", "qk_rope_head_dim", default=0)
        elif kind == "mfa":
            fields["q_lora_rank"] = get("q_lora_rank")
        else:
            fields |= {name: get(name, default=0) for name in ("tpa_q_rank", "tpa_kv_rank")}
    if isinstance(fields["num_layers"], int) and fields["num_layers"] > MOST_LAYERS:
        raise CheckpointError(
            f"num_layers is {fields['num_layers']}; it can be at most {MOST_LAYERS}"
        )
    try:
        fields |= expert_fields(values | {"ffn_hidden_size": ffn}, fields["num_layers"])
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if "vocab_size" in overrides:
        fields["padded_vocab_size"] = 0
    return ModelDescription(**fields | overrides)


def _no_rope_pattern(freq: Any, num_layers: Any) -> tuple[int, ...]:
    """Megatron's `no_rope_freq` by layers: of N the last of every N layers has no RoPE.

    Raises:
        CheckpointError: it is no pattern of the layers.
    """
    if freq is None or not isinstance(num_layers, int):
        return ()
    if isinstance(freq, list | tuple) and all(type(each) is int for each in freq):
        if any(freq):
            return tuple(freq)
        if len(freq) in (0, num_layers):
            return ()
    if type(freq) is int and 0 < freq <= num_layers <= MOST_LAYERS and num_layers % freq == 0:
        return (*(0,) * (freq - 1), 1) * (num_layers // freq)
    raise CheckpointError(
        f"no_rope_freq is {freq!r:.60}; use a divisor of {num_layers} layers, or a 0 or 1 for each"
    )


ROPE_ARGUMENTS = ("rotary_base", "rope_type", *YARN)
"""Arguments of RoPE, which change when a context is extended."""

_NAMED = {
    "head_dim": "kv_channels",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "no_rope_pattern": "no_rope_freq",
    "tie_embeddings": "untie_embeddings_and_output_weights",
    "moe_layer_pattern": "moe_layer_freq",
}
"""Field of ModelDescription -> Megatron's argument, if the names differ."""

_NOT_COMPARED = {
    *("vocab_size", "seq_length", "max_position_embeddings", "core_form", "dtype"),
    *("moe_router_dtype", "tokenizer_type", "tokenizer_model", "eod_token_id"),
}
"""Fields that do not change the function of a model's weights. For the vocabulary the number of
rows (`padded_vocab_size`) is compared instead."""


def differing_arguments(
    saved: Any, here: Any, relaxed: Collection[str] = ()
) -> list[tuple[str, Any, Any]]:
    """Arguments by which two models with equal weights are different functions.

    Args:
        saved, here: arguments of two runs.
        relaxed: arguments that may differ, such as ROPE_ARGUMENTS.

    Returns:
        (name, saved value, value here) of each difference, in the order of the description.

    Raises:
        CheckpointError: `saved` describes no model.
    """
    there, ours = _mapping(saved), _mapping(here)
    try:
        one, other = from_megatron_args(there), from_megatron_args(ours)
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"its arguments are no model's ({said:.200})") from None
    if one.attention != other.attention:
        return [("attention", one.attention, other.attention)]
    unused = {*_NOT_COMPARED, *(YARN if one.rope_type == other.rope_type == "rope" else ())}
    if set(YARN) & set(relaxed) and None in (there.get("softmax_scale"), ours.get("softmax_scale")):
        unused.add("softmax_scale")  # follows from YaRN's numbers
    found = []
    for field in dataclasses.fields(ModelDescription):
        values = getattr(one, field.name), getattr(other, field.name)
        if field.name in unused or values[0] == values[1]:
            continue
        name = _NAMED.get(field.name, field.name)
        if name == "output_gate" and one.attention == "gqa":
            name = "attention_output_gate"
        said = there.get(name), ours.get(name)
        if said[0] == said[1] or name == "softmax_scale":
            said = values
        found.append((name, *said))
    for name in (*_NEEDED, *_REFUSED):
        if name in ("swiglu", "qk_layernorm", "no_rope_freq"):  # fields
            continue
        values = [_plain(of.get(name), _NEEDED.get(name)) for of in (there, ours)]
        if values[0] != values[1]:
            found.append((name, there.get(name), ours.get(name)))
    return [each for each in found if each[0] not in relaxed]


def _plain(value: Any, default: Any) -> Any:
    """The value of a Megatron argument for a comparison; arguments of older runs may lack it."""
    if value is None or value is False or value == []:
        return default or None
    return tuple(value) if isinstance(value, list) else value


def _mapping(args: Any) -> dict[str, Any]:
    """Name -> value of a namespace, mapping or configuration object."""
    return dict(args) if isinstance(args, Mapping) else dict(vars(args))


def _padded(values: Mapping[str, Any]) -> int:
    """The vocabulary padded by the rule of Megatron's VocabUtility."""
    multiple = values.get("make_vocab_size_divisible_by") or 128
    multiple *= values.get("tensor_model_parallel_size") or 1
    return -(-(values.get("vocab_size") or 0) // multiple) * multiple


def check_convertible(args: Any) -> None:
    """Check that a checkpoint of a run with these arguments can be converted.

    Raises:
        CheckpointError: names the argument that is missing, or the value that is not supported.
    """
    values = _mapping(args)
    _refuse_unsupported(values)
    needed = ["num_attention_heads", "num_layers", "hidden_size", "ffn_hidden_size"]
    needed += ["layernorm_epsilon", "max_position_embeddings"]
    if not values.get("vocab_size"):
        needed.append("padded_vocab_size")
    if values.get("attention") == "mlra":
        needed += ["qk_head_dim", "qk_pos_emb_head_dim"]
        needed += ["num_latent_heads", "num_branches", "kv_lora_rank", "v_head_dim"]
    for name in needed:
        if values.get(name) is None:
            raise CheckpointError(f"the checkpoint's arguments name no {name}")
    if problem := refused_experts(values) or from_megatron_args(values).routing_problem():
        raise CheckpointError(problem)


def to_megatron_args(description: ModelDescription) -> dict[str, Any]:
    """The arguments from which `mlra pretrain` builds this model, without those of parallelism and
    training.

    `params_dtype` is a text, and `padded_vocab_size` is left to the writer of a checkpoint.
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
        "attention": description.attention,
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
        "no_rope_freq": list(description.no_rope_pattern) or None,
        "mtp_num_layers": description.mtp_num_layers or None,
        "mtp_use_repeated_layer": description.mtp_use_repeated_layer,
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
    names += ("query_head_norm", "variance_scaling", "output_gate")
    args |= {name: getattr(description, name) for name in names}
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
    "rotary_interleaved",
    "use_rope_scaling",
    "rotary_seq_len_interpolation_factor",
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
        if values.get(name) and (kind, name) != ("mlra", "no_rope_freq"):
            raise CheckpointError(f"a model with {name} ({values[name]!r}) cannot be converted")
