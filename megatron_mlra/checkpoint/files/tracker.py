"""The tracker file of a `--save` folder, which names the step of its newest checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_mlra.checkpoint.files.inside import inside, open_inside
from megatron_mlra.description.model import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
FORMAT_FILE = "metadata.json"
"""Says which format a checkpoint has; one of the last files that Megatron writes."""


def tracked_step(folder: Path) -> str | None:
    """What the tracker file of a `--save` folder says: 'release', the digits of a step, or '' (a
    job died while it wrote). None without a tracker file.

    Raises:
        CheckpointError: it says anything else, which is not taken for a path.
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
