"""The tokenizer an exported folder ships with: copied, or made for byte-level models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from megatron_mlra.checkpoint.files.tokenizer_copy import copy_tokenizer, say_nothing
from megatron_mlra.checkpoint.folder import CheckpointFolder
from megatron_mlra.checkpoint.tokenizer import chosen_tokenizer, own_tokenizer
from megatron_mlra.description.model import CheckpointError, ModelDescription

END_OF_DOCUMENT = "<|endoftext|>"


def write_tokenizer(
    source: CheckpointFolder,
    model: ModelDescription,
    folder: Path,
    tokenizer: str | None = None,
    *,
    outside: bool = False,
    say: Callable[[str], object] = say_nothing,
) -> str | None:
    """Write or copy the model's tokenizer files, and `generation_config.json`, into `folder`.

    Args:
        tokenizer: 'byte', or a folder with tokenizer files; default: the files beside the weights,
            or bytes where the metadata of a Megatron run's data says so.
        outside: also copy files that the checkpoint only names, into a folder that nobody gets.
        say: is told which files were copied from where.

    Returns:
        None, or one line that says why there is no tokenizer.

    Raises:
        CheckpointError: `tokenizer` is neither, or does not fit the vocabulary; or a file is a link
            out of its folder.
    """
    missing = None
    if tokenizer is None:
        files, missing = own_tokenizer(source, outside)
    else:
        files = "byte" if tokenizer == "byte" else chosen_tokenizer(tokenizer)
    if files == "byte":
        _write_byte_tokenizer(model, folder)
    else:
        copy_tokenizer(files, folder, say)
    generation = folder / "generation_config.json"
    if model.eod_token_id is not None and not generation.exists():
        ids = {"eos_token_id": model.eod_token_id, "pad_token_id": model.eod_token_id}
        generation.write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    return missing


def _write_byte_tokenizer(model: ModelDescription, folder: Path) -> None:
    """UTF-8 bytes as ids 0..255 and the end of a document, as `preprocess` encodes them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    end = 256 if model.eod_token_id is None else model.eod_token_id
    if end < 256 or model.vocab_size <= end:
        raise CheckpointError(
            f"a byte tokenizer has ids 0 to 255 and an end of document, and this model has"
            f" {model.vocab_size} with end of document {end}; give the tokenizer's folder"
        )
    byte_of = _byte_letters()
    tokenizer = Tokenizer(models.BPE(vocab={letter: b for b, letter in byte_of.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    if tokenizer.token_to_id(END_OF_DOCUMENT) != end:
        raise CheckpointError(f"a byte tokenizer ends documents with id 256, not {end}")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "pad_token": END_OF_DOCUMENT,
        "model_max_length": model.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        # As in the training data, the end of a document written in a text is plain characters.
        "split_special_tokens": True,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )


def _byte_letters() -> dict[int, str]:
    """The printable letter that byte-level tokenizers write for each byte (GPT-2's table).

    Printable Latin-1 bytes are themselves, the others follow from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}
