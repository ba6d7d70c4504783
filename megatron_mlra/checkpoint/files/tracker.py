"""The saved steps of a `--save` folder, and its tracker file, which names the newest one.

A run that resumes and all other readers choose a step here. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from megatron_mlra.checkpoint.files.inside import inside, open_inside
from megatron_mlra.checkpoint.files.manifest import MANIFEST
from megatron_mlra.command_line.early import a_folder
from megatron_mlra.description.model import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
NO_CHECKPOINT = (
    f"{{}} holds no checkpoint: no {TRACKER}, .metadata or config.json; give the --save of a run,"
    " its iter_* folder, or an exported folder"
)
FORMAT_FILE = "metadata.json"
"""File that names the format of a checkpoint; one of the last files that Megatron writes."""
ITERATION = re.compile(r"iter_(\d+)").fullmatch
_WRITTEN_LAST = (".metadata", FORMAT_FILE, MANIFEST)
"""Files of a checkpoint that are written after all tensors."""


def a_checkpoint(value: str | Path, flag: str, what: str = "a checkpoint's folder") -> None:
    """The check of a parser's argument, see command_line/early.py: a folder with a file by which
    checkpoint/formats.py tells the kinds of checkpoints apart.

    Args:
        what: what to give where there is no folder, for the message.

    Raises:
        ValueError: the folder is missing, or has none of these files.
    """
    a_folder(value, flag, what)
    if not (is_megatron(value) or (Path(value) / "config.json").is_file()):
        raise CheckpointError(NO_CHECKPOINT.format(value))


def is_megatron(folder: str | Path) -> bool:
    """Whether a folder is a checkpoint of Megatron, or a `--save` folder with one. Its tracker file
    may be lost.

    Raises:
        ValueError: see `saved_without_tracker`.
    """
    folder = Path(folder)
    if (folder / TRACKER).is_file() or (folder / ".metadata").is_file():
        return True
    return not (folder / "config.json").is_file() and bool(saved_without_tracker(folder))


def step_folder(folder: Path, step: int) -> Path:
    """The folder of a step in a `--save` folder."""
    return folder / f"iter_{step:07d}"


def step_of(folder: Path) -> int:
    """The step of an `iter_*` folder."""
    return int(folder.name.removeprefix("iter_"))


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


def latest_step(folder: str | Path) -> int | None:
    """The step that the tracker file of `folder` names, 0 for a release; None without a tracker.

    Raises:
        ValueError: the tracker file names no step, or cannot be read.
    """
    text = tracked_step(Path(folder))
    if text is None:
        return None
    if text == "release":
        return 0
    if not text:
        # The job or its machine died between truncating the file and writing it: the newest folder
        # is the one of that save.
        return max(steps(folder), default=None)
    return int(text)


def untracked(folder: str | Path) -> str | None:
    """Why the tracker file of a `--save` folder names no step, as the begin of a line; None where
    it names one.

    Raises:
        ValueError: see `tracked_step`.
    """
    text = tracked_step(Path(folder))
    if text is None:
        return f"{folder} has no {TRACKER} (lost, or not copied along)"
    return None if text else f"{Path(folder) / TRACKER} is empty (its writer died)"


def candidates(load: str | Path, step: int | None = None) -> list[Path]:
    """Checkpoint folders to load from, best first: the one that the tracker names, then earlier
    steps. Later ones were never completed. Without a tracker: all complete steps, newest first.

    Args:
        step: if given, the only step to load.

    Raises:
        ValueError: the tracker file names no step, or the folder cannot be read.
    """
    load = Path(load)
    if step:
        return [step_folder(load, step)]
    latest = latest_step(load)
    if latest is None:
        return saved_without_tracker(load)
    if not latest:
        return [load / "release"]
    earlier = sorted((other for other in steps(load) if other < latest), reverse=True)
    return [step_folder(load, number) for number in (latest, *earlier)]


def saved_without_tracker(folder: str | Path) -> list[Path]:
    """Complete checkpoints of a folder whose tracker file was lost or not copied, newest first.

    A run that was killed in its first save leaves no tracker either; its checkpoint lacks the files
    that are written last.

    Raises:
        ValueError: the folder cannot be read, or holds a `release` checkpoint.
    """
    folder = Path(folder)
    if (folder / "release").is_dir():
        raise ValueError(
            f"{folder} holds release/, but no {TRACKER}; write the word release into that file"
        )
    paths = [step_folder(folder, number) for number in sorted(steps(folder), reverse=True)]
    return [path for path in paths if any((path / name).exists() for name in _WRITTEN_LAST)]


def steps(folder: str | Path) -> set[int]:
    """Steps of the `iter_*` folders in `folder`, complete or not; empty if `folder` is missing.

    Raises:
        ValueError: the folder exists but cannot be read.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise ValueError(f"checkpoint folder {folder} cannot be read ({error.strerror})") from None
    return {int(found[1]) for name in names if (found := ITERATION(name))}


def first_usable(
    folders: list[Path],
    check: Callable[[Path], object],
    how: str = "--ckpt-step names the step to load",
) -> tuple[Path | None, list[str]]:
    """(The first folder that `check` accepts, the errors of those before it); (None, []) without
    folders.

    Args:
        how: the way to name another step, for the message.

    Raises:
        ValueError: all folders are refused; the error of the first.
    """
    refused: list[str] = []
    for folder in folders:
        try:
            check(folder)
        except ValueError as error:
            refused.append(str(error))
        else:
            return folder, refused
    if not refused:
        return None, []
    raise ValueError(f"{refused[0]}; {_others(folders, how)}")


def _others(folders: list[Path], how: str) -> str:
    """The end of the message that all folders are refused: steps that could be loaded instead."""
    if len(folders) > 1:
        return f"the {len(folders) - 1} earlier ones are damaged too"
    there = sorted(path.name for path in folders[0].parent.glob("iter_*") if path != folders[0])
    if not there:
        return "there is no other"
    return f"there is {', '.join(there)}: {how}"
