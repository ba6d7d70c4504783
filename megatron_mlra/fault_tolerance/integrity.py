"""Checks before a run: the checkpoint of --load is whole and fits, the disk of --save has room."""

from __future__ import annotations

import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Collection
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megatron_mlra.checkpoint.files.tracker import first_usable
from megatron_mlra.checkpoint.megatron.torch_dist import TorchDistFolder
from megatron_mlra.command_line import parser
from megatron_mlra.command_line.printable import size
from megatron_mlra.description.megatron_args import ROPE_ARGUMENTS, differing_arguments
from megatron_mlra.description.model import CheckpointError
from megatron_mlra.fault_tolerance.data_change import other_samples
from megatron_mlra.fault_tolerance.optimizer_state import check_optimizer
from megatron_mlra.fault_tolerance.rope_change import BY_PRESET, changes
from megatron_mlra.fault_tolerance.saved_steps import check_unused, to_load


def check_load(args: Namespace) -> bool:
    """Check that the checkpoint of `--load` is complete and fits the architecture and the
    optimizer. Rank 0 prints what the command line changes in its RoPE and lengths, and a warning
    where other samples come next. Sets `args.planned_samples`, the samples of the checkpoint's
    whole run; None if they are not known.

    Returns:
        Whether the run has layers of multi-token prediction that begin anew, beside weights that
        are loaded.

    Raises:
        ValueError: names the checkpoint, and the damaged file or the arguments that differ.
    """
    args.planned_samples = None
    folder = folder_to_load(args)
    if folder is None:
        if not args.perform_initialization and args.pretrained_checkpoint is None:
            raise ValueError(
                "--no-initialization leaves the weights as the memory was, and there is no"
                " checkpoint to load; leave it out"
            )
        return False
    stored = opened(folder)
    args.planned_samples = _planned(stored.common_state().get("args"))
    given = parser.flags_given(sys.argv[1:])
    changed = check_architecture(stored, args, given)
    if changed and args.rank == 0:
        by_preset = all(text.endswith(BY_PRESET) for text in changed)
        parser.say(f"{folder}: {', '.join(changed)}{'' if by_preset else ', as asked'}")
    check_optimizer(stored, args)
    warning = other_samples(stored.common_state()["args"], args)
    if warning and args.rank == 0:
        parser.say(warning)
    return adds_multi_token(stored.common_state()["args"], args)


def _planned(saved: Namespace | None) -> int | None:
    counted = getattr(saved, "train_samples", None)
    steps, batch = (getattr(saved, name, None) for name in ("train_iters", "global_batch_size"))
    return counted or (steps * batch if steps and batch else None)


def adds_multi_token(saved: Namespace, args: Namespace) -> bool:
    """Whether `--mtp-num-layers` asks for layers that a checkpoint of the arguments `saved` has
    not."""
    return bool(getattr(args, "mtp_num_layers", None)) and not getattr(
        saved, "mtp_num_layers", None
    )


def folder_to_load(args: Namespace) -> Path | None:
    """The complete checkpoint that `--load` will read; None if the run starts at step 0.

    Raises:
        ValueError: `--load` names no complete checkpoint.
    """
    return first_usable(to_load(args), check_complete)[0]


def check_complete(folder: Path) -> None:
    """Check that every file of a torch_dist checkpoint's index exists at full length, that the
    arguments can be read, and that no entry holds code.

    Raises:
        ValueError: names the first missing or short file, or the code.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} is missing")
    opened(folder).common_state()


_opened: dict[Path, tuple[tuple, TorchDistFolder]] = {}


def opened(folder: Path) -> TorchDistFolder:
    """A checkpoint, read and checked; cached until its files change. The start of a run needs it
    several times, and the index of a large run has hundreds of megabytes.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    state = _state(folder)
    known = _opened.get(folder)
    if known is None or known[0] != state:
        _opened.clear()
        known = _opened[folder] = (state, TorchDistFolder(folder))
    return known[1]


def forget_opened() -> None:
    """Empty the cache of `opened`."""
    _opened.clear()


def _state(folder: Path) -> tuple:
    """(name, inode, size, modification time in ns) of a folder's files."""
    try:
        with os.scandir(folder) as entries:
            stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError as error:
        raise ValueError(f"checkpoint {folder} cannot be read ({error.strerror})") from None
    return tuple(sorted((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats))


def check_architecture(
    stored: TorchDistFolder, args: Namespace, given: Collection[str] = ()
) -> list[str]:
    """Compare the arguments in a checkpoint with those of this run.

    Args:
        given: flags on the command line.

    Returns:
        The changes of RoPE and lengths that the flags ask for, and the new layers, as texts.

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
    adds = adds_multi_token(saved, args)
    for name, there, here in found:
        fix = ""
        if adds and name in ("mtp_num_layers", "mtp_use_repeated_layer"):
            if args.finetune:
                continue
            fix = " (--finetune begins a new run with these weights and new layers)"
        if name == "padded_vocab_size":
            fix = f" (train with --padded-vocab-size {there}, or convert it with {here})"
            if isinstance(there, int) and there < (args.vocab_size or 0):
                fix = (
                    f" (the {args.vocab_size} tokens of this run's data do not fit; use data of its"
                    " tokenizer)"
                )
        different.append(f"{name} is {there} there, {here} here{fix}")
    changed, unasked = changes(saved, args, set(given))
    different += unasked
    if adds:
        layers = 1 if args.mtp_use_repeated_layer else args.mtp_num_layers
        said = f"{layers} layer{'s' * (layers > 1)} of multi-token prediction"
        changed.append(f"{said} that it has not, newly initialised")
    if different:
        raise ValueError(
            f"checkpoint {folder} is of another architecture: {'; '.join(different)}; use its"
            " values, or another --load"
        )
    return changed


def check_save(args: Namespace, parameters: int) -> None:
    """Check that `--save` can be written, has room for a checkpoint, and holds none of another run.

    A checkpoint holds the weights and, with the optimizer, Adam's two moments in float32 and a
    float32 copy of 16-bit weights.

    Args:
        parameters: of the model.

    Raises:
        ValueError: names the folder, and the fix or the bytes needed.
    """
    if args.save is None:
        return
    folder = Path(args.save)
    existing = parser.check_writable(folder, f"--save {folder}")
    check_unused(args)
    low = args.bf16 or args.fp16
    needed = parameters * ((2 if low else 4) + (0 if args.no_save_optim else 12 if low else 8))
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"--save {folder} has {size(free)} free and a checkpoint needs {size(needed)}; free"
            " some, or use another disk"
        )


def reason(error: BaseException) -> str:
    """The reason why a checkpoint could not be written, in one line: the first rank's error."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    # "Worker failure: An error is caught while starting worker 0, error: ..."
    return " ".join(str(error).split()).rpartition(", error: ")[2]
