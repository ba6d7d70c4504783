"""The tokenizer of an exported folder: copied, or written for byte-level models."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_mlra.checkpoint.files.tokenizer_copy import (
    CHAT_TEMPLATE,
    CODE,
    copy_tokenizer,
    json_object,
    say_nothing,
)
from megatron_mlra.checkpoint.folder import CheckpointFolder
from megatron_mlra.checkpoint.huggingface.chat_template import read_template
from megatron_mlra.checkpoint.tokenizer import (
    GENERATION,
    chosen_tokenizer,
    data_tokenizer,
    ends_of_text,
    own_tokenizer,
)
from megatron_mlra.data.errors import InputError
from megatron_mlra.data.tokenizers import read_tokenizer_json
from megatron_mlra.description.model import CheckpointError, ModelDescription

CHAT = "chat_template.jinja"
OF_ANOTHER_MODEL = (CHAT, GENERATION)
"""Files that describe the use of a model. They are not copied from a tokenizer's folder that the
user names: there they describe another model."""
END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|padding|>"
PADDING_BYTE = 255
"""The byte that stands for padding, which no UTF-8 text contains. The end of a document must not be
the padding: labels of padding are ignored, so that a fine-tuned model would never learn to stop."""


def write_tokenizer(
    source: CheckpointFolder,
    model: ModelDescription,
    folder: Path,
    tokenizer: str | None = None,
    *,
    chat_template: str | None = None,
    outside: bool = False,
    say: Callable[[str], object] = say_nothing,
) -> str | None:
    """Write or copy the model's tokenizer files, and `generation_config.json`, into `folder`.

    Args:
        tokenizer: 'byte', or a folder with tokenizer files, of which the chat template and the
            generation_config.json are not copied. Default: the files beside the weights, or bytes
            if the metadata of a Megatron run's data names them.
        chat_template: a file with the Jinja template that the model was trained with.
        outside: also copy files elsewhere that the checkpoint names. For a `folder` that is not
            published.
        say: called with one line per copied file.

    Returns:
        None, or one line with the reason why there is no tokenizer.

    Raises:
        CheckpointError: `tokenizer` is neither 'byte' nor such a folder, or 'byte' does not fit the
            vocabulary; or the tokenizer.json or generation_config.json cannot be read, or has
            tokens that the model has not; or a file is a link out of its folder; or the chat
            template is no Jinja.
    """
    template = None if chat_template is None else read_template(chat_template)
    missing, foreign = None, False
    if tokenizer is None:
        files, missing = own_tokenizer(source, outside)
    elif tokenizer == "byte":
        files = "byte"
    else:
        files, foreign = chosen_tokenizer(tokenizer), True
    if files == "byte":
        _write_byte_tokenizer(model, folder)
        _write_generation(model, folder)
    else:
        without = (CODE, CHAT_TEMPLATE) if foreign else (CODE,)
        if foreign:
            files = [file for file in files if file.name not in OF_ANOTHER_MODEL]
        copy_tokenizer(files, folder, say, without, linked=outside and not foreign)
        with _named_as_found(files, folder):
            _check_vocabulary(model, folder)
            _name_end_of_document(source, model, folder)
            _write_generation(model, folder)
    if template is not None:
        (folder / CHAT).write_text(template, encoding="utf-8")
    return missing


@contextlib.contextmanager
def _named_as_found(files: list[Path], folder: Path) -> Iterator[None]:
    """Errors name the files that were copied, not their copies, which are gone after an error."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for file in files:
            text = text.replace(str(folder / file.name), str(file))
        raise CheckpointError(text) from None


def _check_vocabulary(model: ModelDescription, folder: Path) -> None:
    """Refuse a tokenizer with ids that the model has no embedding of.

    Raises:
        CheckpointError: names the numbers of tokens.
    """
    file = folder / "tokenizer.json"
    if not file.is_file() or importlib.util.find_spec("tokenizers") is None:
        return
    ids = read_tokenizer_json(file).get_vocab(with_added_tokens=True).values()
    if max(ids, default=-1) >= model.vocab_size:
        raise CheckpointError(
            f"{file} has {max(ids) + 1} tokens and the model {model.vocab_size}; give the folder"
            " of the tokenizer that the model was trained with: --tokenizer FOLDER"
        )


def has_chat_template(folder: Path) -> bool:
    """Whether the exported folder has a chat template."""
    if (folder / CHAT).is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(json_object(config).get(CHAT_TEMPLATE))


def _write_generation(model: ModelDescription, folder: Path) -> None:
    """Add the model's end of document to `generation_config.json`, where servers look for it.

    Raises:
        CheckpointError: the file ends texts with what is no token of the model.
    """
    file = folder / GENERATION
    config = json_object(file) if file.exists() else {}
    ids = ends_of_text(file, model.vocab_size) if file.exists() else []
    end = model.eod_token_id if model.eod_token_id is not None else _end_of_tokenizer(folder)
    if end is None or end in ids:
        return
    config["eos_token_id"] = [*ids, end] if ids else end
    config.setdefault("pad_token_id", end)
    _write_json(file, config)


def _end_of_tokenizer(folder: Path) -> int | None:
    """The id of the tokenizer's `eos_token`; None if unknown."""
    file, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not (file.is_file() and config.is_file()):
        return None
    token = json_object(config).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str):
        return None
    with contextlib.suppress(InputError):  # tokenizer.json is damaged
        return read_tokenizer_json(file).token_to_id(token)
    return None


def _name_end_of_document(source: CheckpointFolder, model: ModelDescription, folder: Path) -> None:
    """Write a missing tokenizer_config.json with the end-of-document token of the model or of its
    data. The `tokenizers` library saves only tokenizer.json, where transformers does not look."""
    file, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file() or config.exists():
        return
    end = None
    if model.eod_token_id is not None:
        end = read_tokenizer_json(file).id_to_token(model.eod_token_id)
    if end is None:
        with contextlib.suppress(CheckpointError):
            made_with = data_tokenizer(source)
            end = made_with.eod_token if made_with else None
    _write_config(model, folder, {} if end is None else {"eos_token": end})


def _write_config(model: ModelDescription, folder: Path, special: dict[str, str]) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": model.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_byte_tokenizer(model: ModelDescription, folder: Path) -> None:
    """Write a tokenizer of UTF-8 bytes (ids 0..255) and the end of a document (id 256), which
    encodes as `preprocess` does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    end = 256 if model.eod_token_id is None else model.eod_token_id
    if end < 256 or model.vocab_size <= end:
        raise CheckpointError(
            f"a byte tokenizer has ids 0 to 255 and an end of document, and this model has"
            f" {model.vocab_size} with end of document {end}; give the tokenizer's folder"
        )
    vocabulary = {letter: byte for byte, letter in _byte_letters().items() if byte != PADDING_BYTE}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {PADDING: PADDING_BYTE}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(text, special=True, normalized=False) for text in (PADDING, END_OF_DOCUMENT)
    ]
    tokenizer.add_special_tokens(special)
    if tokenizer.token_to_id(END_OF_DOCUMENT) != end:
        raise CheckpointError(f"a byte tokenizer ends documents with id 256, not {end}")
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_config(model, folder, {"eos_token": END_OF_DOCUMENT, "pad_token": PADDING})


def _byte_letters() -> dict[int, str]:
    """Byte -> printable letter, the table of GPT-2's byte-level tokenizer.

    Printable Latin-1 bytes map to themselves, the others to U+0100 and following.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}
