"""The README.md of an exported folder: what the model is, what it was trained on, how to run it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_mlra.checkpoint.folder import CheckpointFolder
from megatron_mlra.checkpoint.tokenizer import data_prefixes
from megatron_mlra.cost.cache import DTYPE, kv_cache_bytes_per_token
from megatron_mlra.cost.parameters import parameters
from megatron_mlra.data import read_metadata
from megatron_mlra.description.model import ModelDescription

RANKS = (1, 4, 8)
"""Tensor-parallel sizes in the table of cache bytes."""
MOST_DATA = 20
"""Most data sets that are listed."""
LATENT_DIMS, ROPE_DIMS = (64, 128, 256, 512), (32, 64)
"""What vLLM's plugin takes: those of `mlra_kernels.latent_decode`, which a test compares. Importing
them would import Triton."""


def model_card(
    source: CheckpointFolder, model: ModelDescription, name: str, *, tokenizer: bool, chat: bool
) -> str:
    """The text of a model's README.md.

    Args:
        source: the checkpoint that the model was exported from.
        name: of the folder.
        tokenizer, chat: whether the folder has a tokenizer, and a chat template.
    """
    chat = chat and tokenizer
    latent = model.attention == "mlra"
    norm = " (RMSNorm of query heads)" * model.query_head_norm
    name = _plain(name)
    call = f'"{name}", trust_remote_code=True' if latent else f'"{name}"'
    # Rows that only pad the vocabulary are not exported.
    whole = replace(model, padded_vocab_size=model.vocab_size)
    count = parameters(whole.decoder())
    ahead = _ahead(model, parameters(whole).total - count.total)
    active = f", {count.active:,} of them for a token" if count.active != count.total else ""
    tags = ["tags: [custom_code, mlra]"] if latent else []
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *tags,
        "---",
        f"# {name}",
        "",
        f"A decoder-only language model with {model.variant} attention{norm}, {count.total:,}"
        f" parameters{active}: {model.num_layers} layers of width {model.hidden_size},"
        f" {model.num_attention_heads} heads, {model.vocab_size:,} tokens in its vocabulary,"
        f" {model.max_position_embeddings:,} positions, weights in {model.dtype}.",
        *ahead,
        "",
        _use(tokenizer, chat),
        "",
        "| tensor-parallel ranks | " + " | ".join(map(str, RANKS)) + " |",
        "|---" * (len(RANKS) + 1) + "|",
        f"| KV cache, bytes per token and rank in {DTYPE} | "
        + " | ".join(f"{kv_cache_bytes_per_token(model, tp):,}" for tp in RANKS)
        + " |",
        "",
        "## Run it",
        "```python",
        *_running(call, tokenizer),
        "```",
        *_serving(model, name, tokenizer, chat),
        "",
        "## Training",
        *_training(source),
    ]
    return "\n".join(lines) + "\n"


def _use(tokenizer: bool, chat: bool) -> str:
    if chat:
        return "It has a chat template."
    if tokenizer:
        return "It is a base model: it continues text and has no chat template."
    return "It is a base model, in a folder without a tokenizer: it continues lists of token ids."


def _running(call: str, tokenizer: bool) -> list[str]:
    """Python that continues a text, or token ids. `call`: arguments of `from_pretrained`."""
    model = f'model = AutoModelForCausalLM.from_pretrained({call}, dtype="auto")'
    if not tokenizer:
        return [
            "import torch",
            "from transformers import AutoModelForCausalLM",
            "",
            model,
            "print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=50)[0].tolist())",
        ]
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        model,
        f"tokenizer = AutoTokenizer.from_pretrained({call})",
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
    ]


def unserved(model: ModelDescription) -> str | None:
    """Why the plugin of vLLM refuses a model with latent attention, whatever the ranks; or None."""
    if model.no_rope_pattern or not model.qk_rope_head_dim:
        return "the plugin's attention has RoPE in every layer"
    for what, size, sizes in (
        ("latents", model.latent_dim, LATENT_DIMS),
        ("RoPE keys", model.qk_rope_head_dim, ROPE_DIMS),
    ):
        if size not in sizes:
            return f"the plugin takes {what} of {', '.join(map(str, sizes))} numbers, not {size}"
    return None


def _serving(model: ModelDescription, name: str, tokenizer: bool, chat: bool) -> list[str]:
    """How vLLM serves the model, or why it does not."""
    latent = model.attention == "mlra"
    if latent and (reason := unserved(model)):
        return [f"vLLM does not serve it: {reason}."]
    plugin = (
        "vLLM 0.26 serves it by the plugin of the megatron-mlra project, without"
        " `--trust-remote-code`:"
        if latent
        else "vLLM serves it as a Llama, without a plugin:"
    )
    install = 'pip install "./kernels[vllm]"   # in a checkout of megatron-mlra\n' if latent else ""
    url = "http://127.0.0.1:8000/v1/" + ("chat/completions" if chat else "completions")
    said = '"prompt": "Once upon"' if tokenizer else '"prompt": [1, 2, 3]'
    said = '"messages": [{"role": "user", "content": "Once"}]' if chat else said
    if not tokenizer:
        said += ', "return_token_ids": true'
    return [
        plugin,
        "```",
        f"{install}vllm serve {name}" + " --skip-tokenizer-init" * (not tokenizer),
        f"curl {url} -H 'Content-Type: application/json' \\",
        f'  -d \'{{"model": "{name}", {said}, "max_tokens": 50}}\'',
        "```",
    ]


def _ahead(model: ModelDescription, count: int) -> list[str]:
    """Of multi-token prediction, whose layers have `count` parameters."""
    if not model.mtp_num_layers:
        return []
    layers = "layer" if model.draft_layers == 1 else f"{model.draft_layers} layers"
    return [
        "",
        f"Its {layers} of multi-token prediction ({count:,} more parameters,"
        f" `model.layers.{model.num_layers}` on) can guess tokens in speculative decoding;"
        " transformers leaves them alone.",
    ]


def _training(source: CheckpointFolder) -> list[str]:
    """Lines on the run's step and data, from the checkpoint and the metadata of its data."""
    args, step = source.args, source.iteration
    samples, length = (_number(args, key) for key in ("consumed_train_samples", "seq_length"))
    found = []
    if isinstance(step, int) and step > 0:
        tokens = f", {samples * length:,} tokens" if samples and length else ""
        sequences = f", in sequences of {length:,}" if length else ""
        found.append(f"Step {step:,}{tokens}{sequences}.")
    if rows := [_data(prefix) for prefix in data_prefixes(source)[:MOST_DATA]]:
        found += ["", "| data | documents | tokens | tokenizer |", "|---|---|---|---|", *rows]
    return found or ["Not recorded in the checkpoint that this folder was made from."]


def _data(prefix: str) -> str:
    """A row of the table of data. Of the path only the last part is published."""
    try:
        metadata = read_metadata(prefix) or {}
    except (ValueError, OSError):
        metadata = {}
    described = metadata.get("tokenizer")
    kind = described.get("type") if isinstance(described, Mapping) else None
    cells = [_plain(Path(prefix).name)]
    for key in ("documents", "tokens"):
        count = metadata.get(key)
        cells.append(f"{count:,}" if isinstance(count, int) else "?")
    cells.append(_plain(kind) if isinstance(kind, str) else "?")
    return "| " + " | ".join(cells) + " |"


def _number(args: Any, key: str) -> int | None:
    value = getattr(args, key, None)
    return value if isinstance(value, int) and value > 0 else None


def _plain(text: str) -> str:
    """Text of a checkpoint or path, without letters special to Markdown, JSON or a shell."""
    return re.sub(r"[^\w.+-]", "_", text)[:100] or "model"
