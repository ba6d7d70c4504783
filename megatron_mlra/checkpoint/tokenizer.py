"""Finds a checkpoint's tokenizer, and decides which of its files may be copied.

A checkpoint names paths: --tokenizer-model of its run, and data whose metadata name a tokenizer.
The user's own process may read a tokenizer from there. An export is published, and a stranger's
checkpoint could name any file of this machine. So an export holds only files from beside the
weights, or of a tokenizer that the user names.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from megatron_mlra.checkpoint.files.tokenizer_copy import json_object
from megatron_mlra.checkpoint.folder import CheckpointFolder, tokenizer_files
from megatron_mlra.command_line.plain_file import sha256
from megatron_mlra.data import read_metadata
from megatron_mlra.data.prefixes import without_weights
from megatron_mlra.data.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    TokenizerSpec,
    build_tokenizer,
)
from megatron_mlra.description.model import CheckpointError

WHOLE = ("tokenizer.json", "tokenizer.model")
"""Files each of which alone is a tokenizer."""

GENERATION = "generation_config.json"

_NAME_ONE = "name one by --tokenizer byte or FOLDER"


def chosen_tokenizer(folder: str) -> list[Path]:
    """The tokenizer files of a folder that the user names.

    Raises:
        CheckpointError: the folder has no tokenizer.json.
    """
    files = tokenizer_files(Path(folder))
    if not any(file.name == "tokenizer.json" for file in files):
        raise CheckpointError(
            f"tokenizer {folder} is neither 'byte' nor a folder with a tokenizer.json"
        )
    return files


def own_tokenizer(
    source: CheckpointFolder, outside: bool = False
) -> tuple[str | list[Path], str | None]:
    """The tokenizer of a checkpoint.

    Args:
        outside: also return files elsewhere that the checkpoint names, to be read and not copied.

    Returns:
        ('byte' or the files, one line that says what is missing or None).
    """
    beside = source.tokenizer_files()
    if any(file.name in WHOLE for file in beside):
        return beside, None
    named = source.named_tokenizer()
    if not any(file.name in WHOLE for file in named):
        try:
            made_with = data_tokenizer(source)
        except CheckpointError as error:
            return beside, f"no tokenizer: {error}; {_NAME_ONE}"
        if made_with is None:
            of_data = " or ".join(
                f"{Path(prefix).absolute()}.json" for prefix in data_prefixes(source)
            )
            none = f"no files beside the weights, and no {of_data or 'metadata of the data'}"
            return beside, f"no tokenizer: {none}; {_NAME_ONE}"
        if made_with.type == "byte":
            return "byte", None
        if made_with.type != "hf":
            has_none = f"{made_with.type} {made_with.model} has no tokenizer.json"
            return beside, f"no tokenizer: {has_none}; {_NAME_ONE}"
        model = Path(made_with.model)
        named = tokenizer_files(model.parent, follow_links=True) or [model]
    if outside:
        return named, None
    first = named[0].absolute()
    return beside, (
        f"no tokenizer: {first}, which the checkpoint names, lies outside of it and is not copied"
        f" unless you name it: --tokenizer {shlex.quote(str(first.parent))}"
    )


def data_tokenizer(source: CheckpointFolder) -> TokenizerSpec | None:
    """The tokenizer in the metadata of the run's data, of the first data set that has metadata;
    None without metadata.

    Raises:
        CheckpointError: the tokenizer's file is missing or has another checksum.
    """
    for prefix in data_prefixes(source):
        try:
            metadata = read_metadata(prefix)
        except ValueError:
            continue
        described = metadata and metadata.get("tokenizer")
        if not isinstance(described, Mapping):
            continue
        kind, model = str(described.get("type")), described.get("model")
        if "sha256" not in described and kind != "hf":  # an hf tokenizer is always a file
            if model is not None and (os.sep in str(model) or Path(str(model)).exists()):
                raise CheckpointError(f"{prefix}.json names the file {model} without its sha256")
            return TokenizerSpec(kind, model)
        file = Path(str(model))
        if not file.is_file() or sha256(file) != described.get("sha256"):
            raise CheckpointError(f"{file} is gone or is not the file the data was made with")
        if kind == "hf":
            return TokenizerSpec(kind, model, described.get("eod_token"))
        return TokenizerSpec(
            kind, model, eod_id=metadata.get("eod_id"), pattern=described.get("pattern")
        )
    return None


def data_prefixes(source: CheckpointFolder) -> list[str]:
    """The prefixes of the data that a Megatron run trained on, each once; empty for other kinds of
    folders."""
    found = (getattr(source.args, name, None) for name in ("data_path", "train_data_path"))
    return without_weights(next(filter(None, found), []))


def checkpoint_tokenizer(
    folder: CheckpointFolder, type: str | None = None, model: str | None = None
) -> Tokenizer:
    """The named tokenizer. Without a name: the tokenizer.json beside the weights or that the
    checkpoint names, else the tokenizer of the run's data, else bytes for a vocabulary of 257.

    Args:
        type: 'byte', 'hf' or 'tiktoken'.
        model: see TokenizerSpec; without `type`, its name tells the type.

    Raises:
        ValueError: no tokenizer is found, or it has more tokens than the model.
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


def stop_ids(folder: CheckpointFolder) -> list[int]:
    """Tokens that end a text besides the tokenizer's end of document: those that the
    generation_config.json beside the weights names, as transformers and servers read it.

    Raises:
        CheckpointError: the file is damaged, or names what is no token of the model.
    """
    files = [file for file in folder.tokenizer_files() if file.name == GENERATION]
    return ends_of_text(files[0], folder.description.vocab_size) if files else []


def ends_of_text(file: Path, vocab_size: int) -> list[int]:
    """The `eos_token_id` of a generation_config.json as a list; see `stop_ids`."""
    named = json_object(file).get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if any(type(token) is not int or not 0 <= token < vocab_size for token in ids):
        raise CheckpointError(
            f"{file}: eos_token_id is {named!r:.60}, and the model's tokens are 0 to"
            f" {vocab_size - 1}; correct the file"
        )
    return ids
