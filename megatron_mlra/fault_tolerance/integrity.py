"""Refuse a damaged or foreign checkpoint before loading, a disk too small before training."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Collection
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megatron_mlra.checkpoint.files.manifest import MANIFEST
from megatron_mlra.checkpoint.files.torch_dist_index import FORMAT_FILE
from megatron_mlra.checkpoint.folder import TRACKER, tracked_step
from megatron_mlra.checkpoint.megatron.torch_dist import TorchDistFolder
from megatron_mlra.command_line import parser
from megatron_mlra.description.megatron_args import ROPE_ARGUMENTS, differing_arguments
from megatron_mlra.description.model import CheckpointError
from megatron_mlra.fault_tolerance.optimizer_state import check_optimizer
from megatron_mlra.fault_tolerance.rope_change import changes

_ITERATION = re.compile(r"iter_(\d+)").fullmatch


def latest_step(folder: str | Path) -> int | None:
    """The step of the checkpoint that `folder` names as its latest, None where it names none.

    Raises:
        ValueError: for a tracker file that names no step, or cannot be read.
    """
    text = tracked_step(Path(folder))
    if text is None:
        return None
    if text == "release":
        return 0
    if not text:
        # The job or its machine died between truncating the file and writing it. Whatever folder
        # is complete was saved before, or just now.
        return max(steps(folder), default=None)
    return int(text)


def mend_tracker(load: str | Path, step: int) -> None:
    """Write `step` into a tracker file that is empty, which Megatron cannot read, or gone."""
    tracker = Path(load) / TRACKER
    if not tracker.is_file() or not tracker.read_text().strip():
        parser.write_text(tracker, str(step))


def candidates(load: str | Path, step: int | None = None) -> list[Path]:
    """Checkpoint folders to load from, best first: the one that the tracker names, then earlier
    steps; only `step` if it is given. What is later than the tracker was never completed. Without a
    tracker: every step whose save came to its end, newest first.

    Raises:
        ValueError: for a tracker file that names no step, a folder that cannot be read.
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
    """Checkpoints of a folder that has no tracker file, newest first: it was lost, or the folders
    were copied without it. A run that was killed in its first save leaves neither a tracker nor any
    of the files that are written last.

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
"""Files of a checkpoint that are written once all tensors are."""


def steps(folder: str | Path) -> set[int]:
    """Steps of which `folder` holds an `iter_*` folder, complete or not.

    Raises:
        ValueError: the folder is there but cannot be read: what it holds is unknown.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise ValueError(f"checkpoint folder {folder} cannot be read ({error.strerror})") from None
    return {int(found[1]) for name in names if (found := _ITERATION(name))}


def first_usable(
    folders: list[Path], check: Callable[[Path], None]
) -> tuple[Path | None, list[str]]:
    """The first folder that `check` does not refuse, and why those before it were.

    Raises:
        ValueError: if there are folders and all are refused; names the first.
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
    raise ValueError(f"{refused[0]}; {_others(folders)}")


def _others(folders: list[Path]) -> str:
    """Which steps could be loaded in place of these folders, all of which were refused."""
    if len(folders) > 1:
        return f"the {len(folders) - 1} earlier ones are damaged too"
    there = sorted(path.name for path in folders[0].parent.glob("iter_*") if path != folders[0])
    if not there:
        return "there is no other"
    return f"there is {', '.join(there)}: --ckpt-step names the step to load"


def check_load(args: Namespace, argv: list[str] | None = None) -> None:
    """Check what `--load` will read: complete, and of this architecture; rank 0 says what of it the
    command line `argv` changes.

    Raises:
        ValueError: names the checkpoint, and the damaged file or the arguments that differ.
    """
    folder = folder_to_load(args)
    if folder is None:
        return
    stored = opened(folder)
    given = parser.flags_given(sys.argv[1:] if argv is None else argv)
    changed = check_architecture(stored, args, given)
    if changed and args.rank == 0:
        parser.say(f"{folder}: {', '.join(changed)}, as asked")
    check_optimizer(stored, args)


def folder_to_load(args: Namespace) -> Path | None:
    """The checkpoint that `--load` will read, complete; None where the run starts anew.

    Raises:
        ValueError: there is none, or none that is complete.
    """
    if args.load is None:
        return None
    starts_anew = args.load == args.save and not args.exit_on_missing_checkpoint
    if not Path(args.load).is_dir():
        if starts_anew and not os.path.lexists(args.load):
            return None
        raise ValueError(f"--load {args.load} is not a folder; give the --save of an earlier run")
    folder, _ = first_usable(candidates(args.load, args.ckpt_step), check_complete)
    if folder is None:
        if starts_anew:
            return None
        also = ""
        if (Path(args.load) / "config.json").is_file():
            also = "; an exported folder is made one by mlra convert import-hf"
        raise ValueError(
            f"--load {args.load} holds no checkpoint (no {TRACKER}); give the --save of an earlier"
            f" run{also}"
        )
    return folder


def check_complete(folder: Path) -> None:
    """Check that every file a torch_dist checkpoint's metadata refers to is there, at full length,
    that its arguments can be read, and that what Megatron unpickles holds no code.

    Raises:
        ValueError: names the first missing or short file, or the code.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} is missing")
    opened(folder).common_state()


_opened: dict[Path, tuple[tuple, TorchDistFolder]] = {}


def opened(folder: Path) -> TorchDistFolder:
    """A checkpoint, read and checked once as long as its files stay as they are: a start asks for
    it several times, and the index of a large run has hundreds of megabytes.

    Raises:
        ValueError: it cannot be read.
    """
    state = _state(folder)
    known = _opened.get(folder)
    if known is None or known[0] != state:
        _opened.clear()
        known = _opened[folder] = (state, TorchDistFolder(folder))
    return known[1]


def forget_opened() -> None:
    """Free what `opened` keeps."""
    _opened.clear()


def _state(folder: Path) -> tuple:
    """Names, sizes and times of change of a folder's files."""
    try:
        with os.scandir(folder) as entries:
            stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError as error:
        raise ValueError(f"checkpoint {folder} cannot be read ({error.strerror})") from None
    return tuple(sorted((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats))


def check_architecture(
    stored: TorchDistFolder, args: Namespace, given: Collection[str] = ()
) -> list[str]:
    """Compare the arguments a checkpoint was saved with to these.

    Returns:
        what of its RoPE and lengths the flags `given` change.

    Raises:
        ValueError: names every argument that differs, with both values.
    """
    folder, saved = stored.path, stored.common_state().get("args")
    if not isinstance(saved, Namespace):
        raise ValueError(
            f"checkpoint {folder} names no arguments; it was not written by this trainer"
        )
    different = []
    try:
        found = differing_arguments(saved, args, ROPE_ARGUMENTS)
    except CheckpointError as error:
        raise ValueError(f"checkpoint {folder}: {error}") from None
    for name, there, here in found:
        fix = ""
        if name == "padded_vocab_size":
            fix = f" (train with --padded-vocab-size {there}, or convert it with {here})"
        different.append(f"{name} is {there} there, {here} here{fix}")
    changed, unasked = changes(saved, args, set(given))
    different += unasked
    if different:
        raise ValueError(f"checkpoint {folder} is of another architecture: {'; '.join(different)}")
    return changed


def check_writable(flag: str, folder: str | Path) -> Path:
    """Check that a folder, which need not exist, can be written.

    Returns:
        the nearest folder that exists.

    Raises:
        ValueError: it cannot; names the flag and the folder.
    """
    existing = folder = Path(folder)
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"{flag} {folder} cannot be written: {existing} is not a folder")
    try:
        # Asked of the file system itself: permission bits say nothing about a read-only mount.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"{flag} {folder} cannot be written ({error.strerror}); use another folder"
        ) from None
    return existing


def check_save(args: Namespace, parameters: int) -> None:
    """Check that `--save` can be written, has room for one checkpoint and none of another run.

    A checkpoint holds the weights and, with the optimizer, Adam's two moments in 32 bits and beside
    16-bit weights a 32-bit copy of them.

    Raises:
        ValueError: names the folder, and the fix or the bytes needed.
    """
    if args.save is None:
        return
    folder = Path(args.save)
    existing = check_writable("--save", folder)
    check_unused(args)
    low = args.bf16 or args.fp16
    needed = parameters * ((2 if low else 4) + (0 if args.no_save_optim else 12 if low else 8))
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"--save {folder} has {free / 1e9:.1f} GB free and a checkpoint needs"
            f" {needed / 1e9:.1f} GB; free some, or use another disk"
        )


def check_unused(args: Namespace) -> None:
    """Check that `--save` holds no checkpoints, unless this run continues them.

    Raises:
        ValueError: it does; names the newest, and the fix.
    """
    folder = Path(args.save)
    if args.load is not None and Path(args.load).resolve() == folder.resolve():
        return
    step = latest_step(folder)
    if step is None and (saved := saved_without_tracker(folder)):
        step = int(saved[0].name.removeprefix("iter_"))
    if step is not None:
        raise ValueError(
            f"--save {folder} holds a checkpoint of step {step:,}, which this run would replace;"
            f" add --load {folder} to continue it, or use another folder"
        )


def reason(error: BaseException) -> str:
    """Why a checkpoint could not be written, in one line: the first rank's own error."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    # "Worker failure: An error is caught while starting worker 0, error: ..."
    return " ".join(str(error).split()).rpartition(", error: ")[2]
