"""Copying tokenizer files into a folder that will be published."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_mlra.checkpoint.files.inside import open_inside
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
    linked: bool = False,
) -> None:
    """Copy files as `tokenizer_files` found them, and say of each where it came from.

    Args:
        without: what is left out of a tokenizer_config.json.
        linked: follow links out of the files' folder, which whoever runs the tool has named.

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
        copy_file(file, target, linked)
        left_out = ""
        # The copy is read: nobody else changes it.
        if file.name == "tokenizer_config.json" and (config := _with_any(target, without, file)):
            named = {key: config.pop(key) for key in without if key in config}
            target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
            left_out = "".join(f", without its {key} {value!r:.80}" for key, value in named.items())
        say(f"copied {file.name} from {file.resolve()}{left_out}")


def copy_file(file: Path, target: Path, linked: bool = False) -> None:
    """Copy a file's content. Its mode is not the copy's.

    Args:
        linked: follow a link out of the file's folder.

    Raises:
        CheckpointError: it is a link out of its folder, or no plain file.
    """
    file = file.resolve() if linked else file
    with open_inside(file.parent, file.name) as opened, target.open("xb") as written:
        shutil.copyfileobj(opened, written)


def json_object(file: Path, called: Path | None = None) -> dict[str, Any]:
    """What a tokenizer's or a model's small JSON file holds.

    Args:
        called: of what it is a copy, for messages.

    Raises:
        CheckpointError: it cannot be read, or is no JSON object.
    """
    try:
        config = read_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{called or file} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{called or file} is not a JSON object")
    return config


def _with_any(file: Path, keys: tuple[str, ...], called: Path) -> dict | None:
    """The configuration, if it has one of the keys."""
    config = json_object(file, called)
    return config if any(key in config for key in keys) else None
