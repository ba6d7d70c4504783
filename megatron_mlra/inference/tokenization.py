"""The tokenizer of a checkpoint, and text that grows token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_mlra.checkpoint.data_tokenizer import data_tokenizer
from megatron_mlra.checkpoint.folders import CheckpointFolder
from megatron_mlra.preprocess.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    TokenizerSpec,
    build_tokenizer,
)

UNFINISHED = "\ufffd"
"""What bytes that are no whole character decode to."""


def checkpoint_tokenizer(
    folder: CheckpointFolder, type: str | None = None, model: str | None = None
) -> Tokenizer:
    """The named tokenizer; without a name the tokenizer.json beside the weights, the one the run's
    data was made with, or bytes.

    Bytes are taken for a model of 257 tokens, which is what that tokenizer has.

    Raises:
        ValueError: none can be told, or it has more tokens than the model.
    """
    files = folder.tokenizer_files() or folder.named_tokenizer()
    beside = [path for path in files if path.name == "tokenizer.json"]
    vocab = folder.description.vocab_size
    if type is None and model is not None:
        type = "hf" if Path(model).is_dir() or model.endswith(".json") else "tiktoken"
    if model is None and beside and type in (None, "hf"):
        type, model = "hf", str(beside[0])
    if type is not None:
        spec = TokenizerSpec(type, model)
    else:
        spec = data_tokenizer(folder)
        if spec is None and vocab == ByteTokenizer.vocab_size:
            spec = TokenizerSpec("byte")
    if spec is None:
        raise ValueError(
            f"{folder.path} holds no tokenizer.json; name the tokenizer the model was trained"
            " with: --tokenizer byte, or hf or tiktoken with --tokenizer-model"
        )
    tokenizer = build_tokenizer(spec)
    if tokenizer.vocab_size > vocab:
        raise ValueError(
            f"the {spec.type} tokenizer has {tokenizer.vocab_size} tokens and the model {vocab};"
            " use the tokenizer it was trained with"
        )
    return tokenizer


class GrowingText:
    """Text of a request's output, handed out as it becomes certain."""

    def __init__(self, detokenize: Callable[[list[int]], str]) -> None:
        self._detokenize = detokenize
        self._given = ""

    def more(self, ids: list[int], last: bool = False) -> str:
        """What `ids` (all so far) add; a character cut in half waits for its rest."""
        text = self._detokenize(ids)
        if not last:
            text = text.rstrip(UNFINISHED)
        if not text.startswith(self._given):
            # A tokenizer that rewrites earlier text: wait until it agrees again.
            return ""
        added, self._given = text[len(self._given) :], text
        return added
