"""Resumes from the newest checkpoint that is whole."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mlra.checkpoint.files.tracker import candidates, first_usable, step_of, untracked
from megatron_mlra.command_line.parser import say
from megatron_mlra.fault_tolerance import checksums, integrity, saved_steps
from megatron_mlra.fault_tolerance.optimizer_state import before_first_update, other_end


def choose_step(load_checkpoint: Callable, args: Namespace) -> Callable:
    """Megatron's `load_checkpoint`, for the newest step whose checkpoint is whole. Sets
    `args.before_first_update`."""

    def load(*rest, **named):
        asked = args.ckpt_step
        args.before_first_update = False
        if args.load is not None:
            args.ckpt_step = whole_step(args)
            args.before_first_update = args.ckpt_step and _on_first_rank(
                lambda: before_first_update(integrity.opened(integrity.folder_to_load(args)))
            )
            integrity.forget_opened()
        try:
            result = load_checkpoint(*rest, **named)
        finally:
            args.ckpt_step = asked
        scheduler = next((it for it in rest if isinstance(it, OptimizerParamScheduler)), None)
        # Megatron returns the step first, and sets args.iteration later.
        reached = Namespace(**vars(args) | {"iteration": result[0]})
        line = scheduler and result[0] and other_end(scheduler, reached)
        if args.rank == 0 and line:
            say(line)
        return result

    return load


def whole_step(args: Namespace) -> int | None:
    """The step to load, the same on every rank; None if there is nothing to load, or a release.
    Rank 0 prints why newer checkpoints are skipped.

    Raises:
        ValueError: no checkpoint is whole, or the one of --ckpt-step is not.
    """
    # Only one rank lists the folder: others may see an earlier state of a shared folder.
    found = _on_first_rank(lambda: candidates(args.load, args.ckpt_step))
    folder, refused = first_usable(found, check_whole)
    if args.rank == 0:
        for why in refused:
            say(f"warning: {why}")
        if refused:
            say(f"warning: continuing from the checkpoint before: {folder}")
    if folder and args.rank == 0 and (folder.name == "release" or args.finetune):
        say(f"starting at step 0 with the weights of {folder}")
    if folder is None or folder.name == "release":
        return None
    step = step_of(folder)
    _on_first_rank(lambda: _name_step(args, step))
    return step


def _name_step(args: Namespace, step: int) -> None:
    """Write a missing or empty tracker file, from which Megatron reads the step."""
    if not args.ckpt_step and (why := untracked(args.load)):
        say(f"warning: {why}: continuing from the newest whole checkpoint, that of step {step:,}")
    try:
        saved_steps.mend_tracker(args.load, step)
    except OSError:
        # Another run's folder may be read-only; Megatron is given the step.
        if saved_steps.same_folder(args):
            raise


def check_whole(folder: Path) -> None:
    """Check the sizes of a checkpoint's files on rank 0, and the checksums on all ranks together.

    Raises:
        ValueError: names the first file that is missing, short or changed; the same on every rank.
    """
    _on_first_rank(lambda: integrity.check_complete(folder))
    if what := checksums.damage_anywhere(folder):
        raise ValueError(f"checkpoint {folder} is damaged: {what}")


def _on_first_rank(work: Callable[[], Any]) -> Any:
    """Run `work` on the first rank; every rank returns its result.

    Raises:
        ValueError: `work` raised an error; its text, in one line, on every rank.
    """
    result: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            result[0] = work()
        except Exception as error:
            result[1] = checksums.with_type(error)
    torch.distributed.broadcast_object_list(result)
    if result[1] is not None:
        raise ValueError(result[1])
    return result[0]
