"""Copying tokenizer files into a folder that will be published."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_mlra.checkpoint.description import CheckpointError
from megatron_mlra.checkpoint.folders import is_tokenizer_file
from megatron_mlra.foreign_text import read_json

CODE = "auto_map"
"""Where a tokenizer's configuration names Python code that `trust_remote_code` would run."""


def say_nothing(_line: str) -> None:
    """For callers that need not hear what was copied."""


def copy_tokenizer(files: Iterable[Path], folder: Path, say: Callable[[str], object]) -> None:
    """Copy files as `tokenizer_files` found them, and say of each where it came from.

    What a tokenizer_config.json says of code to run is left out: the code is not copied, and it may
    be anybody's.

    Raises:
        CheckpointError: a file has no tokenizer's name, or would replace one of the folder.
    """
    for file in files:
        target = folder / file.name
        if not is_tokenizer_file(file.name):
            raise CheckpointError(f"{file} is not copied: {file.name} is no tokenizer file's name")
        if os.path.lexists(target):
            raise CheckpointError(f"{file} would replace the {file.name} that was just written")
        without = ""
        if file.name == "tokenizer_config.json" and (config := _with_code(file)) is not None:
            named = config.pop(CODE)
            target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
            without = f", without its {CODE} {named!r:.80}"
        else:
            # The content alone: the mode of the source's file is not the export's.
            shutil.copyfile(file, target)
        say(f"copied {file.name} from {file.resolve()}{without}")


def _with_code(file: Path) -> dict | None:
    """The configuration, if it names code.

    Raises:
        CheckpointError: it is no JSON object.
    """
    try:
        config = read_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return config if CODE in config else None
