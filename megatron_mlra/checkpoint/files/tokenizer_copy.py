"""Copying tokenizer files into a folder that will be published."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_mlra.checkpoint.folder import is_tokenizer_file
from megatron_mlra.command_line.foreign_text import read_json
from megatron_mlra.description.model import CheckpointError

CODE = "auto_map"
"""Where a tokenizer's configuration names Python code that `trust_remote_code` would run."""
CHAT_TEMPLATE = "chat_template"
"""Where it holds how a conversation is written."""


def say_nothing(_line: str) -> None:
    """For callers that need not hear what was copied."""


def copy_tokenizer(
    files: Iterable[Path],
    folder: Path,
    say: Callable[[str], object],
    without: tuple[str, ...] = (CODE,),
) -> None:
    """Copy files as `tokenizer_files` found them, and say of each where it came from.

    Args:
        without: what is left out of a tokenizer_config.json.

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
        left_out = ""
        if file.name == "tokenizer_config.json" and (config := _with_any(file, without)):
            named = {key: config.pop(key) for key in without if key in config}
            target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
            left_out = "".join(f", without its {key} {value!r:.80}" for key, value in named.items())
        else:
            # The content alone: the mode of the source's file is not the export's.
            shutil.copyfile(file, target)
        say(f"copied {file.name} from {file.resolve()}{left_out}")


def json_object(file: Path) -> dict[str, Any]:
    """What a tokenizer's or a model's small JSON file holds.

    Raises:
        CheckpointError: it cannot be read, or is no JSON object.
    """
    try:
        config = read_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return config


def _with_any(file: Path, keys: tuple[str, ...]) -> dict | None:
    """The configuration, if it has one of the keys."""
    config = json_object(file)
    return config if any(key in config for key in keys) else None
