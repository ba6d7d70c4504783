"""Deletes all but the newest checkpoints of a folder, and never one that a resumption needs."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megatron_mlra.checkpoint.files.tracker import latest_step, step_folder, steps
from megatron_mlra.fault_tolerance.integrity import check_complete

_DELETED = re.compile(r"\.deleted-iter_\d{7,}").fullmatch


def prune(folder: str | Path, keep: int) -> list[int]:
    """Delete all but the newest `keep` complete checkpoints; returns the deleted steps.

    The checkpoint that the tracker names always stays, and so do later ones, which are still being
    written. Incomplete checkpoints do not count, and stay for inspection. A folder is renamed
    before it is emptied: no `iter_*` folder is ever partly deleted.
    """
    folder = Path(folder)
    latest = latest_step(folder)
    if latest is None:
        return []
    for left in folder.glob(".deleted-iter_*"):
        # Other names that begin like this are not ours. Neither a link nor its target is deleted.
        if _DELETED(left.name) and left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
    named = {step: step_folder(folder, step) for step in steps(folder)}
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
        except OSError:  # a file or folder of this name is in the way
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
