"""Keep the newest K checkpoints of a folder, and never less than what a resumption needs."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megatron_mlra.fault_tolerance.integrity import check_complete
from megatron_mlra.fault_tolerance.saved_steps import latest_step, steps

_DELETED = re.compile(r"\.deleted-iter_\d{7,}").fullmatch


def prune(folder: str | Path, keep: int) -> list[int]:
    """Delete all but the newest `keep` complete checkpoints; returns the steps deleted.

    The one that the tracker names stays whatever happens, and so do those after it, which are still
    being written. Incomplete ones before it count for nothing and stay too, to be looked at. A
    folder is renamed before it is emptied, so that none is ever seen half deleted.
    """
    folder = Path(folder)
    latest = latest_step(folder)
    if latest is None:
        return []
    for left in folder.glob(".deleted-iter_*"):
        # Not what only begins like this; of a link neither the link nor what it points to.
        if _DELETED(left.name) and left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
    named = {step: folder / f"iter_{step:07d}" for step in steps(folder)}
    found = {step: path for step, path in named.items() if path.is_dir() and not path.is_symlink()}
    older = [step for step in sorted(found, reverse=True) if step < latest]
    kept, deleted = int(latest in found and _is_complete(found[latest])), []
    for step in older:
        if not _is_complete(found[step]):
            continue
        if kept < keep:
            kept += 1
            continue
        aside = folder / f".deleted-{found[step].name}"
        try:
            os.rename(found[step], aside)
        except OSError:  # Something else of this name is in the way.
            continue
        shutil.rmtree(aside, ignore_errors=True)
        deleted.append(step)
    return deleted


def _is_complete(path: Path) -> bool:
    try:
        check_complete(path)
    except ValueError:
        return False
    return True
