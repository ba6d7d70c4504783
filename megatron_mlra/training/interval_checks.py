"""Checks of what a run does every so many steps besides training, before Megatron sees the flags.

Megatron refuses these values by an assertion without a message, or ends at the step that is due.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_mlra.command_line.parser import flag

SAVED = ("params", "activations", "tokens_per_expert", "wgrads", "dgrads")
"""What `--save-X-interval` writes beside the checkpoints."""
WITH_TE = ("activations", "dgrads")
"""Those for which Megatron 0.19.2 names Transformer Engine's layers, installed or not."""

MULTIPLES = (("save_retain_interval", "save_interval"), ("log_memory_interval", "log_interval"))
"""Intervals that are multiples of others."""


def check(args: Namespace) -> None:
    """Refuse intervals that do not fit the other flags.

    Raises:
        ValueError: one line that names the flag, the value and the fix.
    """
    for what in SAVED:
        name = f"save_{what}_interval"
        if (steps := getattr(args, name)) is None:
            continue
        if args.save is None:
            raise ValueError(f"{flag(name)} {steps} needs a folder; add --save")
        if what in WITH_TE and not HAVE_TE:
            raise ValueError(
                f"{flag(name)} {steps} fails in Megatron 0.19.2 without Transformer Engine; install"
                " the extra megatron-mlra[te], or leave it out"
            )
    for name, of in MULTIPLES:
        steps, unit = getattr(args, name), getattr(args, of)
        if steps is not None and steps % unit:
            raise ValueError(
                f"{flag(name)} {steps} is no multiple of {flag(of)} {unit}; use"
                f" {-(-steps // unit) * unit}"
            )
    if (phases := args.phase_transition_iterations) is not None and args.train_samples is None:
        raise ValueError(
            f"--phase-transition-iterations {phases} needs a length in samples; add --train-samples"
        )
    if args.profile:
        _check_profile(args)


def _check_profile(args: Namespace) -> None:
    first, last = args.profile_step_start, args.profile_step_end
    if last <= first:
        raise ValueError(
            f"--profile-step-end {last} is not behind --profile-step-start {first}; use at least"
            f" {first + 1}"
        )
    if not (args.use_pytorch_profiler or torch.cuda.is_available() or args.dry_run):
        raise ValueError(
            "--profile needs a GPU, and there is none; add --use-pytorch-profiler, or leave it out"
        )
