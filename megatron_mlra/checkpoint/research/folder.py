"""Folders of the MLRA paper's research code, read and written.

The `config.json` does not name the variant. The names and shapes of the weights tell it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_mlra.checkpoint.files import manifest
from megatron_mlra.checkpoint.files.safetensors_writer import (
    MAX_SHARD_BYTES,
    write_index,
    write_safetensors,
)
from megatron_mlra.checkpoint.files.staging import written_aside
from megatron_mlra.checkpoint.files.tokenizer_copy import copy_tokenizer, say_nothing
from megatron_mlra.checkpoint.files.weight_files import WeightFiles, common_dtype
from megatron_mlra.checkpoint.folder import CheckpointFolder, check_tensors, read_config
from megatron_mlra.checkpoint.research.names import RESEARCH_EMBEDDING, RESEARCH_OUTPUT, rules
from megatron_mlra.checkpoint.rules import their_shapes
from megatron_mlra.checkpoint.stream import TensorStream
from megatron_mlra.checkpoint.tokenizer import chosen_tokenizer, own_tokenizer
from megatron_mlra.description.model import CheckpointError, ModelDescription, check_layers
from megatron_mlra.description.tensors import layer_prefix

FORMATS = ("safetensors", "bin")
_ATTENTION = "transformer.h.0.attn."


class ResearchFolder(CheckpointFolder):
    """`config.json` and `pytorch_model*.bin` or `model*.safetensors` of the research code."""

    kind = "research"

    def __init__(self, path: Path, verify: bool) -> None:
        self.path = path
        self.verify = verify
        config = read_config(path, verify)
        self.files = WeightFiles(path, verify)
        shapes = dict(self.files.shapes)
        tied = RESEARCH_OUTPUT not in shapes or self._is_tied()
        if tied:
            shapes.pop(RESEARCH_OUTPUT, None)
        try:
            check_layers("config.json: n_layer", config.get("n_layer"), len(shapes))
            fields = infer_fields(config, shapes)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        dtype = common_dtype(self.files.dtypes, path)
        self.description = ModelDescription(**fields, tie_embeddings=tied, dtype=dtype)
        self.rules = rules(self.description)
        check_tensors(
            f"{path} ({self.description.variant})",
            shapes,
            their_shapes(self.description, self.rules),
        )

    def _read(self, name: str) -> torch.Tensor:
        """See CheckpointFolder.tensor."""
        rule = self.rules[name]
        dtype = getattr(torch, self.description.dtype)
        return rule.join([self.files.tensor(their).to(dtype) for their in rule.theirs])

    def _is_tied(self) -> bool:
        """Whether the stored output weight equals the embedding."""
        names = (RESEARCH_EMBEDDING, RESEARCH_OUTPUT)
        if not set(names) <= set(self.files.shapes):
            return False
        return torch.equal(*(self.files.tensor(name) for name in names))


def infer_fields(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Fields of ModelDescription from a research `config.json` and the weights' shapes.

    Raises:
        CheckpointError: a needed key or tensor is missing, or the shapes fit no variant.
    """

    def needed(name: str) -> int:
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json: {name} is {value!r}; it must be at least 1")
        return value

    h = needed("n_head")
    fields: dict[str, Any] = {
        "num_layers": needed("n_layer"),
        "hidden_size": needed("n_embd"),
        "ffn_hidden_size": needed("intermediate_size"),
        "num_attention_heads": h,
        "vocab_size": needed("vocab_size"),
        "output_gate": f"{_ATTENTION}gated_proj.weight" in shapes,
        "variance_scaling": config.get("variance_scaling", True),
        "rotary_base": 10000.0,
        "layernorm_epsilon": 1e-6,
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "eod_token_id": config.get("eos_token_id"),
    }
    query = shapes.get(f"{_ATTENTION}c_q.weight")
    if query is not None:
        key = shapes.get(f"{_ATTENTION}c_k.weight")
        if key is None:
            raise CheckpointError(f"missing {_ATTENTION}c_k.weight")
        if query[0] % h or key[0] % (query[0] // h):
            raise CheckpointError(
                f"attn.c_q is {list(query)} and attn.c_k {list(key)}: no {h} query heads"
            )
        head_dim = query[0] // h
        return fields | {
            "attention": "gqa",
            "head_dim": head_dim,
            "num_query_groups": key[0] // head_dim,
        }
    d_h = needed("qk_nope_head_dim")
    L, N = _latents(shapes, h, d_h)
    return fields | {
        "attention": "mlra",
        "num_latent_heads": L,
        "num_branches": N,
        "q_lora_rank": needed("q_lora_rank"),
        "kv_lora_rank": needed("kv_lora_rank"),
        "qk_nope_head_dim": d_h,
        "qk_rope_head_dim": needed("qk_rope_head_dim"),
        "v_head_dim": d_h,
    }


def _latents(shapes: Mapping[str, tuple[int, ...]], h: int, d_h: int) -> tuple[int, int]:
    """(L, N), from the up-projection's name, or from the number of heads that a latent serves.

    Args:
        h: attention heads.
        d_h: NoPE size of a head.
    """
    if f"{_ATTENTION}kv_b_proj.weight" in shapes:
        return 1, 1
    if f"{_ATTENTION}kv_b_proj_1.weight" in shapes:
        return 2, 1
    shape = shapes.get(f"{_ATTENTION}kv_b_proj")
    if shape is None:
        raise CheckpointError(
            f"missing {_ATTENTION}kv_b_proj (MLRA, GLA-4), kv_b_proj_1.weight (GLA-2),"
            " kv_b_proj.weight (MLA) or c_q.weight (MHA, MQA, GQA)"
        )
    L, served, rest = shape[0], *divmod(shape[-1], 2 * d_h)
    if len(shape) != 3 or rest or not served or h % served or L % (h // served):
        raise CheckpointError(
            f"attn.kv_b_proj is {list(shape)}: no latents that serve {h} heads of {d_h}"
        )
    return L, L // (h // served)


def write_research(
    source: CheckpointFolder,
    destination: str | Path,
    *,
    dtype: str | None = None,
    file_format: str = "safetensors",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: str | None = None,
    progress: bool = True,
    say: Callable[[str], object] = say_nothing,
) -> str | None:
    """Write a folder in the format of the research code.

    Args:
        dtype: of the weights, default the source's.
        file_format: 'safetensors', or 'bin' (one file per layer).
        max_shard_bytes: see `write_safetensors`.
        tokenizer: a folder with tokenizer files; default: the files beside the weights.
        say: called with one line per copied tokenizer file.

    Returns:
        None, or one line that names the tokenizer that was not copied.

    Raises:
        CheckpointError: the research code cannot express the model; or see TensorStream and
            `written_aside`.
    """
    if file_format not in FORMATS:
        raise CheckpointError(f"format is {file_format!r}; use one of {', '.join(FORMATS)}")
    with TensorStream(source, dtype, progress) as stream:
        model = stream.description
        _check_exportable(model)
        table = rules(model)

        def parts(names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
            for name in names:
                yield from table[name].store(stream.take(name))

        with written_aside(destination, stream.bytes) as folder:
            (folder / "config.json").write_text(json.dumps(research_config(model), indent=2) + "\n")
            if file_format == "safetensors":
                shapes = their_shapes(model, table)
                dtypes = dict.fromkeys(shapes, stream.dtype)
                write_safetensors(folder, shapes, dtypes, parts(list(table)), max_shard_bytes)
            else:
                _write_bins(folder, model, list(table), parts, stream.bytes)
            stream.finish()
            if tokenizer is not None:
                files, missing = chosen_tokenizer(tokenizer), None
            else:
                files, (_, missing) = source.tokenizer_files(), own_tokenizer(source)
                missing = missing if source.named_tokenizer() else None
            copy_tokenizer(files, folder, say)
            manifest.write(folder)
            return missing


def _write_bins(folder: Path, model: ModelDescription, names: list[str], parts, total) -> None:
    """Write a `.bin` for the embedding, one per layer, one for the rest, and the index."""
    prefixes = [layer_prefix(i) for i in range(model.num_layers)]
    groups = [names[:1]]
    groups += [[name for name in names if name.startswith(prefix)] for prefix in prefixes]
    groups.append([n for n in names[1:] if not n.startswith("decoder.layers.")])
    where: dict[str, str] = {}
    for i, group in enumerate(groups, 1):
        file = f"pytorch_model-{i:05d}-of-{len(groups):05d}.bin"
        # clone: torch.save would write the whole storage of a view.
        state = {name: tensor.contiguous().clone() for name, tensor in parts(group)}
        # Opened here: on a full disk torch.save would raise a RuntimeError for its own file.
        with (folder / file).open("wb") as opened:
            torch.save(state, opened)
        where |= dict.fromkeys(state, file)
    write_index(folder / "pytorch_model.bin.index.json", total, where)


def research_config(model: ModelDescription) -> dict[str, Any]:
    """The research code's `config.json`."""
    config: dict[str, Any] = {
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_embd": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": model.tie_embeddings,
        "eos_token_id": model.eod_token_id,
        "torch_dtype": model.dtype,
    }
    if model.attention == "mlra":
        for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"):
            config[name] = getattr(model, name)
        if not model.variance_scaling:
            config["variance_scaling"] = False
    return config


def _check_exportable(model: ModelDescription) -> None:
    """Refuse a model that the research code cannot express."""
    latent = model.attention == "mlra"
    if model.num_experts:
        raise CheckpointError(
            f"the research code has no mixture of experts, and this model {model.num_experts}"
            " experts; use export-hf"
        )
    for name, value, needed in (
        ("rotary_base", model.rotary_base, 10000),
        ("layernorm_epsilon", model.layernorm_epsilon, 1e-6),
        ("rope_type", model.rope_type, "rope"),
        ("v_head_dim", model.v_head_dim, model.qk_nope_head_dim),
        ("softmax_scale", model.softmax_scale, model.replace(softmax_scale=None).softmax_scale),
    ):
        if value != needed:
            raise CheckpointError(
                f"the research code has {name} {needed} only, and this model {value}; use export-hf"
            )
    if latent and not model.qk_rope_head_dim:
        raise CheckpointError(
            "the research code rotates at least one pair, and this model none (NoPE); use export-hf"
        )
    if model.no_rope_pattern:
        raise CheckpointError("the research code rotates in every layer; use export-hf")
    if model.query_head_norm:
        raise CheckpointError("the research code has no norm of query heads; use export-hf")
    if latent and model.q_lora_rank is None:
        raise CheckpointError("the research code has no model without q_lora_rank; use export-hf")
