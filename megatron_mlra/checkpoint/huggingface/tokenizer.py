"""The tokenizer an exported folder ships with: copied, or made for byte-level models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_mlra.checkpoint.folder import CheckpointFolder, tokenizer_files
from megatron_mlra.checkpoint.tokenizer import data_prefixes, data_tokenizer
from megatron_mlra.description.model import CheckpointError, ModelDescription

END_OF_DOCUMENT = "<|endoftext|>"


def write_tokenizer(
    source: CheckpointFolder, model: ModelDescription, folder: Path, tokenizer: str | None = None
) -> str | None:
    """Write or copy the model's tokenizer files, and `generation_config.json`, into `folder`.

    Args:
        tokenizer: 'byte', or a folder with tokenizer files; default: the files beside the weights,
            else what the metadata of a Megatron run's data names.

    Returns:
        None, or one line that says why there is no tokenizer.

    Raises:
        CheckpointError: `tokenizer` is neither, or does not fit the vocabulary.
    """
    files, missing = _choose(source, tokenizer)
    if files == "byte":
        _write_byte_tokenizer(model, folder)
    elif files:
        for file in files:
            shutil.copy(file, folder / file.name)
    generation = folder / "generation_config.json"
    if model.eod_token_id is not None and not generation.exists():
        ids = {"eos_token_id": model.eod_token_id, "pad_token_id": model.eod_token_id}
        generation.write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    return missing and f"no tokenizer: {missing}; name one by --tokenizer byte or FOLDER"


def _choose(source: CheckpointFolder, tokenizer: str | None) -> tuple[str | list[Path], str | None]:
    """'byte' or the files to copy, and what is missing."""
    if tokenizer == "byte":
        return "byte", None
    if tokenizer is not None:
        files = tokenizer_files(Path(tokenizer))
        if not any(file.name == "tokenizer.json" for file in files):
            raise CheckpointError(
                f"tokenizer {tokenizer} is neither 'byte' nor a folder with a tokenizer.json"
            )
        return files, None
    files = source.tokenizer_files()
    if any(file.name in ("tokenizer.json", "tokenizer.model") for file in files):
        return files, None
    try:
        made_with = data_tokenizer(source)
    except CheckpointError as error:
        return files, str(error)
    if made_with is None:
        of_data = " or ".join(f"{prefix}.json" for prefix in data_prefixes(source))
        return files, f"no files beside the weights, and no {of_data or 'metadata of the data'}"
    if made_with.type == "byte":
        return "byte", None
    if made_with.type != "hf":
        return files, f"{made_with.type} {made_with.model} has no tokenizer.json"
    return tokenizer_files(Path(made_with.model).parent), None


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
