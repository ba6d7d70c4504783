"""The tracker file of a `--save` folder: it names the step of the newest checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_mlra.checkpoint.files.inside import inside, open_inside
from megatron_mlra.command_line.early import a_folder
from megatron_mlra.description.model import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
NO_CHECKPOINT = (
    f"{{}} holds no checkpoint: no {TRACKER}, .metadata or config.json; give the --save of a run,"
    " its iter_* folder, or an exported folder"
)
FORMAT_FILE = "metadata.json"
"""File that names the format of a checkpoint; one of the last files that Megatron writes."""


def a_checkpoint(value: str | Path, flag: str, what: str = "a checkpoint's folder") -> None:
    """The check of a parser's argument, see command_line/early.py: a folder with a file by which
    checkpoint/formats.py tells the kinds of checkpoints apart.

    Args:
        what: what to give where there is no folder, for the message.

    Raises:
        ValueError: the folder is missing, or has none of these files.
    """
    a_folder(value, flag, what)
    if not any((Path(value) / name).is_file() for name in (TRACKER, ".metadata", "config.json")):
        raise CheckpointError(NO_CHECKPOINT.format(value))


def tracked_step(folder: Path) -> str | None:
    """The content of a `--save` folder's tracker file: 'release', the digits of a step, or '' (a
    job died while writing the file). None without a tracker file.

    Raises:
        CheckpointError: the file has any other content, which must not become part of a path.
    """
    tracker = inside(folder, TRACKER)
    if not tracker.is_file():
        return None
    try:
        with open_inside(folder, TRACKER) as file:
            text = file.read(64).decode("utf-8", errors="replace").strip()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint tracker {tracker} cannot be read ({error.strerror})"
        ) from None
    if text not in ("", "release") and not re.fullmatch("[0-9]{1,18}", text):
        raise CheckpointError(
            f"checkpoint tracker {tracker} holds {text!r:.40}, not a step; write the step of a"
            " complete iter_* folder into it"
        )
    return text
