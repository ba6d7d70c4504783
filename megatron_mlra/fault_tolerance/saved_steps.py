"""Checks of `--load` and `--save`; checkpoint/files/tracker.py lists the saved steps of a folder.

Nothing here imports torch, so that a wrong folder is reported before that slow import.
"""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from pathlib import Path

from megatron_mlra.checkpoint.files.tracker import (
    ITERATION,
    TRACKER,
    candidates,
    latest_step,
    saved_without_tracker,
    step_of,
)
from megatron_mlra.command_line import parser


def mend_tracker(load: str | Path, step: int) -> None:
    """Write `step` into a tracker file that is missing, or empty (which Megatron cannot read)."""
    tracker = Path(load) / TRACKER
    if not tracker.is_file() or not tracker.read_text().strip():
        parser.write_text(tracker, str(step))


def same_folder(args: Namespace) -> bool:
    """Whether `--load` and `--save` name one folder, however each is spelt (`runs/my/`)."""
    if args.load is None or args.save is None:
        return False
    return Path(args.load).resolve() == Path(args.save).resolve()


def check_unused(args: Namespace) -> None:
    """Check that `--save` holds no checkpoint, unless this run continues from that folder. With
    `--finetune` it begins at step 0: the weights may come from the folder's release alone.

    Raises:
        ValueError: names the step of the newest checkpoint, and the fix.
    """
    folder, continues = Path(args.save), same_folder(args)
    if continues and not getattr(args, "finetune", None):
        return
    step = latest_step(folder)
    if step is None and (saved := saved_without_tracker(folder)):
        step = step_of(saved[0])
    if step is None or (continues and not step):
        return
    fix = f"; add --load {shlex.quote(args.save)} to continue it, or use another folder"
    if continues:
        fix = (
            ", since --finetune begins at step 0; use another --save, or leave --finetune out to"
            " continue"
        )
    raise ValueError(
        f"--save {folder} holds a checkpoint of step {step:,}, which this run would replace{fix}"
    )


def to_load(args: Namespace) -> list[Path]:
    """Checkpoint folders that `--load` names, best first; empty if the run starts at step 0.

    Raises:
        ValueError: there is no checkpoint, and `--load` is not also `--save`, or it is an exported
            folder or a checkpoint's own, or `--exit-on-missing-checkpoint` is given.
    """
    if args.load is None:
        return []
    starts_anew = same_folder(args) and not args.exit_on_missing_checkpoint
    if not Path(args.load).is_dir():
        if starts_anew and not os.path.lexists(args.load):
            return []
        raise ValueError(f"--load {args.load} is not a folder; give the --save of an earlier run")
    found = candidates(args.load, args.ckpt_step)
    exported = (Path(args.load) / "config.json").is_file()
    inner = ITERATION(Path(args.load).absolute().name)
    if found or (starts_anew and not exported and not inner):
        return found
    also = "; an exported folder is made one by mlra convert import-hf" if exported else ""
    if inner:
        raise ValueError(
            f"--load {args.load} holds no checkpoint of its own; give {Path(args.load).parent}, and"
            f" --ckpt-step {int(inner[1])}"
        )
    raise ValueError(
        f"--load {args.load} holds no checkpoint (no {TRACKER}); give the --save of an earlier"
        f" run{also}"
    )
