"""The saved steps of a run's folder, and checks of `--load` and `--save`.

Nothing here imports torch, so that a wrong folder is reported before that slow import.
"""

from __future__ import annotations

import os
import re
import shlex
from argparse import Namespace
from pathlib import Path

from megatron_mlra.checkpoint.files.manifest import MANIFEST
from megatron_mlra.checkpoint.files.tracker import FORMAT_FILE, TRACKER, tracked_step
from megatron_mlra.command_line import parser

_ITERATION = re.compile(r"iter_(\d+)").fullmatch


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


def mend_tracker(load: str | Path, step: int) -> None:
    """Write `step` into a tracker file that is missing, or empty (which Megatron cannot read)."""
    tracker = Path(load) / TRACKER
    if not tracker.is_file() or not tracker.read_text().strip():
        parser.write_text(tracker, str(step))


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
        return [load / f"iter_{step:07d}"]
    latest = latest_step(load)
    if latest is None:
        return saved_without_tracker(load)
    if not latest:
        return [load / "release"]
    earlier = sorted((other for other in steps(load) if other < latest), reverse=True)
    return [load / f"iter_{number:07d}" for number in (latest, *earlier)]


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
    newest_first = sorted(steps(folder), reverse=True)
    paths = [folder / f"iter_{number:07d}" for number in newest_first]
    return [path for path in paths if any((path / name).exists() for name in _WRITTEN_LAST)]


_WRITTEN_LAST = (".metadata", FORMAT_FILE, MANIFEST)
"""Files of a checkpoint that are written after all tensors."""


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
    return {int(found[1]) for name in names if (found := _ITERATION(name))}


def check_writable(flag: str, folder: str | Path) -> Path:
    """Check that a folder, which need not exist, can be written.

    Returns:
        The nearest folder above it that exists, or the folder itself.

    Raises:
        ValueError: the folder cannot be written; names the flag and the folder.
    """
    existing = folder = Path(folder)
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"{flag} {folder} cannot be written: {existing} is not a folder")
    try:
        parser.try_writing(existing)
    except OSError as error:
        raise ValueError(
            f"{flag} {folder} cannot be written ({error.strerror}); use another folder"
        ) from None
    return existing


def same_folder(args: Namespace) -> bool:
    """Whether `--load` and `--save` name one folder, however each is spelt (`runs/my/`)."""
    if args.load is None or args.save is None:
        return False
    return Path(args.load).resolve() == Path(args.save).resolve()


def check_unused(args: Namespace) -> None:
    """Check that `--save` holds no checkpoint, unless this run continues from that folder.

    Raises:
        ValueError: names the step of the newest checkpoint, and the fix.
    """
    folder = Path(args.save)
    if same_folder(args):
        return
    step = latest_step(folder)
    if step is None and (saved := saved_without_tracker(folder)):
        step = int(saved[0].name.removeprefix("iter_"))
    if step is not None:
        raise ValueError(
            f"--save {folder} holds a checkpoint of step {step:,}, which this run would replace;"
            f" add --load {shlex.quote(args.save)} to continue it, or use another folder"
        )


def to_load(args: Namespace) -> list[Path]:
    """Checkpoint folders that `--load` names, best first; empty if the run starts at step 0.

    Raises:
        ValueError: there is no checkpoint, and `--load` is not also `--save`, or
            `--exit-on-missing-checkpoint` is given.
    """
    if args.load is None:
        return []
    starts_anew = same_folder(args) and not args.exit_on_missing_checkpoint
    if not Path(args.load).is_dir():
        if starts_anew and not os.path.lexists(args.load):
            return []
        raise ValueError(f"--load {args.load} is not a folder; give the --save of an earlier run")
    found = candidates(args.load, args.ckpt_step)
    if found or starts_anew:
        return found
    also = ""
    if (Path(args.load) / "config.json").is_file():
        also = "; an exported folder is made one by mlra convert import-hf"
    if inner := _ITERATION(Path(args.load).absolute().name):
        raise ValueError(
            f"--load {args.load} holds no checkpoint of its own; give {Path(args.load).parent}, and"
            f" --ckpt-step {int(inner[1])}"
        )
    raise ValueError(
        f"--load {args.load} holds no checkpoint (no {TRACKER}); give the --save of an earlier"
        f" run{also}"
    )
