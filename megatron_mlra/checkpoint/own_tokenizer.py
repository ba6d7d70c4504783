"""Which tokenizer a checkpoint has, and which of its files may be copied.

A checkpoint names paths: its run's --tokenizer-model, and data whose metadata names a tokenizer.
The user's own process may read a tokenizer there. What is exported is published, so it holds only
files beside the weights, or of a tokenizer that the user names: a stranger's checkpoint could name
any file of this machine.
"""

from __future__ import annotations

from pathlib import Path

from megatron_mlra.checkpoint.folder import CheckpointFolder, tokenizer_files
from megatron_mlra.checkpoint.tokenizer import data_prefixes, data_tokenizer
from megatron_mlra.description.model import CheckpointError

WHOLE = ("tokenizer.json", "tokenizer.model")
"""Files either of which is a tokenizer."""


def chosen_tokenizer(folder: str) -> list[Path]:
    """The tokenizer files of a folder that the user names.

    Raises:
        CheckpointError: it has no tokenizer.json.
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
    """The tokenizer of a checkpoint: 'byte' or files.

    Args:
        outside: take files that the checkpoint only names too: to read them, not to copy them.

    Returns:
        'byte' or the files, and one line that says what is missing, or None.
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
        f" unless you name it: --tokenizer {first.parent}"
    )


_NAME_ONE = "name one by --tokenizer byte or FOLDER"
