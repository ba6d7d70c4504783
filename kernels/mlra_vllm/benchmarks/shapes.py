"""Models of 2.9 B parameters, as config.json files without weights."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlra_vllm.shard import plan

_COMMON: dict[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 3072,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": None,
    "eos_token_id": 50256,
}
_LATENT = {
    "model_type": "mlra",
    "architectures": ["MLRAForCausalLM"],
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "output_gate": False,
    "query_head_norm": False,
    "rope_layer_types": None,
    "variance_scaling": True,
    "softmax_scale": 1 / 192**0.5,
}
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "head_dim": 128,
    "attention_bias": False,
    "mlp_bias": False,
}


def _latent(latents: int, branches: int, query_rank: int, mlp: int) -> dict[str, Any]:
    sizes = {"num_latent_heads": latents, "num_branches": branches, "q_lora_rank": query_rank}
    return {**_COMMON, **_LATENT, **sizes, "intermediate_size": mlp}


SHAPES: dict[str, dict[str, Any]] = {
    "mlra4": _latent(4, 4, 1024, 9880),
    "mla": _latent(1, 1, 1536, 9448),
    "gla2": _latent(2, 1, 1024, 10048),
    "gqa6": {**_COMMON, **_LLAMA, "num_key_value_heads": 6, "intermediate_size": 9728},
}
"""Name -> the config.json of the exported 2.9B preset."""


def misfit(names: Iterable[str], sizes: Iterable[int]) -> str | None:
    """Why a model cannot be shared by one of these tensor parallel sizes, in one line, or None."""
    for name, tp in itertools.product(names, sizes):
        shape = SHAPES[name]
        heads, latents = shape["num_attention_heads"], shape.get("num_latent_heads")
        if latents:
            try:
                plan(heads, latents, shape["num_branches"], tp, 0)
            except ValueError as error:
                return f"--tp {tp} of {name}: {error}"
            continue
        inner, own = shape["intermediate_size"], shape["num_key_value_heads"]
        # vLLM copies key/value heads to more ranks than there are.
        if heads % tp or inner % tp or (own % tp and tp % own):
            sizes = f"{heads} heads, {own} of keys, and inner dim {inner}"
            return f"--tp {tp} does not fit {sizes} of {name}"
    return None


def write_shape(name: str, folder: Path, positions: int) -> None:
    """Write a folder for vLLM's `load_format="dummy"`, for up to `positions` tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**SHAPES[name], "max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(config))


UNKNOWN = "<unknown>"


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of one word per token id, for programs that ask for text."""
    # The longest word is longer than any other with the space behind it: vLLM refuses a prompt of
    # more characters than this word times the model's positions.
    words = {UNKNOWN if i == 0 else f"t{i}": i for i in range(_COMMON["vocab_size"])}
    model = {"type": "WordLevel", "vocab": words, "unk_token": UNKNOWN}
    whole = {"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    absent = ("truncation", "padding", "normalizer", "post_processor", "decoder")
    whole |= dict.fromkeys(absent) | {"added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
