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
"""Key of a tokenizer_config.json that names Python code, which `trust_remote_code` would run."""
CHAT_TEMPLATE = "chat_template"
"""Key of a tokenizer_config.json with the Jinja template of a conversation."""


def say_nothing(_line: str) -> None:
    """Drop the line: the default of `say` arguments."""


def copy_tokenizer(
    files: Iterable[Path],
    folder: Path,
    say: Callable[[str], object],
    without: tuple[str, ...] = (CODE,),
    linked: bool = False,
) -> None:
    """Copy the files that `tokenizer_files` found, and report the origin of each.

    Args:
        say: called with one line per file.
        without: keys that are left out of a tokenizer_config.json. By default those that name code
            to run: the code is not copied, and a stranger may have written it.
        linked: follow links out of the files' folder, for a folder that the user has named.

    Raises:
        CheckpointError: a file's name is not a tokenizer's, or the folder has a file of that name.
    """
    for file in files:
        target = folder / file.name
        if not is_tokenizer_file(file.name):
            raise CheckpointError(f"{file} is not copied: {file.name} is no tokenizer file's name")
        if os.path.lexists(target):
            raise CheckpointError(f"{file} would replace the {file.name} that was just written")
        copy_file(file, target, linked)
        left_out = ""
        # The copy is read, since the original may change meanwhile.
        if file.name == "tokenizer_config.json" and (config := _with_any(target, without, file)):
            named = {key: config.pop(key) for key in without if key in config}
            target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
            left_out = "".join(f", without its {key} {value!r:.80}" for key, value in named.items())
        say(f"copied {file.name} from {file.resolve()}{left_out}")


def copy_file(file: Path, target: Path, linked: bool = False) -> None:
    """Copy a file's content, not its mode.

    Args:
        linked: follow a link out of the file's folder.

    Raises:
        CheckpointError: the file is a link out of its folder, or no plain file.
    """
    file = file.resolve() if linked else file
    with open_inside(file.parent, file.name) as opened, target.open("xb") as written:
        shutil.copyfileobj(opened, written)


def json_object(file: Path, called: Path | None = None) -> dict[str, Any]:
    """The object in a small JSON file of a tokenizer or model.

    Args:
        called: name of the file in messages, if `file` is a copy of it.

    Raises:
        CheckpointError: the file cannot be read, or holds no JSON object.
    """
    try:
        config = read_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{called or file} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{called or file} is not a JSON object")
    return config


def _with_any(file: Path, keys: tuple[str, ...], called: Path) -> dict | None:
    """The configuration if it has one of the keys, else None."""
    config = json_object(file, called)
    return config if any(key in config for key in keys) else None
