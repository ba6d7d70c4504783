"""What a run leaves behind that is ended at once. Imported before torch."""

from __future__ import annotations

import contextlib
import shlex
from argparse import Namespace

from megatron_mlra.fault_tolerance.saved_steps import latest_step, same_folder


def what_is_left(args: Namespace) -> str:
    """The end of a line: how far a run came, and what the next one can continue from.

    Args:
        args: with `save` and `load`; Megatron adds `iteration`, the step of the checkpoint that the
            run continues, and `curr_iteration`, the steps that are made.
    """
    first, made = getattr(args, "iteration", 0), getattr(args, "curr_iteration", None)
    line = " before its first step; " if made is None else f" at step {max(made, first) + 1:,}; "
    folders = (args.save,) if same_folder(args) else (args.save, args.load)
    held = {folder: _step(folder) for folder in folders if folder}
    saved = held.get(args.save)
    # With --ckpt-step the folder may still hold an earlier run's later step.
    if made is not None and saved is not None and first < saved <= made + 1:
        folder = shlex.quote(args.save)
        return f"{line}step {saved:,} is saved; continue with --load {folder} --save {folder}"
    line += "nothing was saved by this run"
    earlier = [f"{folder} still holds step {step:,}" for folder, step in held.items() if step]
    return "; ".join((line, *earlier))


def _step(folder: str) -> int | None:
    with contextlib.suppress(ValueError, OSError):
        return latest_step(folder)
    return None
