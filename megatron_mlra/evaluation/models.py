"""Loads a checkpoint of any kind as a transformers model with its tokenizer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mlra.checkpoint.folder import CheckpointFolder
from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.checkpoint.huggingface.config import to_hf_config
from megatron_mlra.checkpoint.huggingface.names import rules
from megatron_mlra.checkpoint.huggingface.tokenizer import write_tokenizer
from megatron_mlra.data.tokenizers import ByteTokenizer
from megatron_mlra.description.model import DTYPES, CheckpointError
from megatron_mlra.evaluation.scoring import Scorer


def load_scorer(
    path: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    tokenizer: str | None = None,
    batch_size: int = 8,
    progress: bool = False,
    verify: bool = True,
) -> Scorer:
    """A scorer of a Megatron, research or exported folder.

    Args:
        dtype: of the model, default that of the weights.
        device: default CUDA if there is a GPU.
        tokenizer: 'byte' or a tokenizer's folder; default: the checkpoint's own.
        batch_size, progress: see Scorer.
        verify: see `open_checkpoint`.

    Raises:
        CheckpointError: the folder cannot be read, has no tokenizer or one that does not fit; or
            the device or dtype does not exist.
    """
    device = check_device(device, dtype)
    source = open_checkpoint(path, verify=verify)
    text = load_tokenizer(source, tokenizer)
    model = load_model(source, dtype).to(device)

    def encode(string: str) -> list[int]:
        # As in training data, a special token written in a text is encoded as plain characters.
        return text.encode(string, add_special_tokens=False, split_special_tokens=True)

    prefix = end_of_document(text, path)
    if max(prefix, len(text) - 1) >= source.description.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {len(text)} tokens and the model {source.description.vocab_size};"
            " give the tokenizer the model was trained with"
        )

    def shared(first: Tensor, rows: Tensor, last: int) -> Tensor:
        cache = model(first, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(rows))
        return model(rows, past_key_values=cache, use_cache=True, logits_to_keep=last).logits

    return Scorer(
        lambda tokens, last: model(tokens, use_cache=False, logits_to_keep=last).logits,
        encode,
        prefix,
        source.description.max_position_embeddings,
        batch_size,
        device,
        progress,
        source.description.vocab_size,
        shared,
    )


def check_device(device: str | None, dtype: str | None) -> str:
    """The device to run on, default CUDA if there is a GPU.

    Raises:
        CheckpointError: the device or dtype does not exist.
    """
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(device)
    except RuntimeError:
        raise CheckpointError(f"device is {device!r}; use cpu, cuda or e.g. cuda:1") from None
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CheckpointError(f"device is {device!r} and there is no GPU; use cpu")
    return device


def end_of_document(tokenizer: Any, path: str | Path) -> int:
    """Id of the token that precedes a text without context: beginning of sequence, else end.

    Raises:
        CheckpointError: the tokenizer of the checkpoint `path` names neither.
    """
    first = tokenizer.bos_token_id
    first = first if first is not None else tokenizer.eos_token_id
    if first is None:
        raise CheckpointError(f"the tokenizer of {path} names no end-of-document token")
    return first


def load_model(source: CheckpointFolder, dtype: str | None = None) -> torch.nn.Module:
    """The transformers model of a checkpoint, on the CPU, in evaluation mode.

    An exported folder's own code is not run; this package has the same files.

    Raises:
        CheckpointError: see `to_hf_config`; or a tensor cannot be read.
    """
    model = source.description.decoder()
    config = to_hf_config(model)
    model_class, config_class = _classes(config["model_type"])
    wanted = getattr(torch, dtype or model.dtype)
    loaded = model_class._from_config(config_class(**config), dtype=wanted)
    stored = loaded.state_dict()
    parameters = dict(loaded.named_parameters())
    parameters |= {name: buffer for name, buffer in loaded.named_buffers() if name in stored}
    with torch.no_grad():
        for name, rule in rules(model).items():
            for their, part in rule.store(source.tensor(name)):
                parameters.pop(their).copy_(part)
    assert not parameters, f"left as initialised: {list(parameters)}"
    return loaded.eval()


def _classes(model_type: str) -> tuple[Any, Any]:
    if model_type == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM, LlamaConfig
    from megatron_mlra.hf.configuration_mlra import MLRAConfig
    from megatron_mlra.hf.modeling_mlra import MLRAForCausalLM

    return MLRAForCausalLM, MLRAConfig


def load_tokenizer(source: CheckpointFolder, tokenizer: str | None = None) -> Any:
    """The transformers tokenizer of a checkpoint; without one, bytes for a vocabulary of 257.

    Raises:
        CheckpointError: there is no tokenizer, or transformers cannot read it.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    with tempfile.TemporaryDirectory() as folder:
        missing = write_tokenizer(source, source.description, Path(folder), tokenizer, outside=True)
        if missing is not None and source.description.vocab_size == ByteTokenizer.vocab_size:
            missing = write_tokenizer(source, source.description, Path(folder), "byte")
        if missing is not None:
            raise CheckpointError(f"{source.path}: {missing}")
        if not (Path(folder) / "tokenizer.json").is_file():
            raise CheckpointError(f"{source.path} has no tokenizer.json; give --tokenizer")
        try:
            # Without a limit: long texts are cut into windows after they are tokenized.
            return PreTrainedTokenizerFast.from_pretrained(
                folder, model_max_length=VERY_LARGE_INTEGER
            )
        except Exception as error:  # a wrong configuration may raise an error of any type
            said = " ".join(str(error).split())
            raise CheckpointError(
                f"the tokenizer of {tokenizer or source.path} is none that transformers can read"
                f" ({type(error).__name__}: {said:.200})"
            ) from None
