"""The tracker file of a `--save` folder: it names the step of the newest checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_mlra.checkpoint.files.inside import inside, open_inside
from megatron_mlra.description.model import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
FORMAT_FILE = "metadata.json"
"""File that names the format of a checkpoint; one of the last files that Megatron writes."""


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
