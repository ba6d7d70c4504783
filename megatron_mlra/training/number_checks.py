"""Checks of the range of the command line's numbers, before Megatron sees them.

A bad number may fail only when the optimizer is built, or at the first update that is not finite.
The run would then end as after a fault, and a launcher would start the run again.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable

from megatron_mlra.command_line.parser import flag

POSITIVE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "seq_length",
    "vocab_size",
    "micro_batch_size",
    "global_batch_size",
    "train_iters",
    "train_samples",
    "lr_decay_iters",
    "lr_decay_samples",
    "log_interval",
    "eval_interval",
    "save_interval",
    "tensorboard_log_interval",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "tpa_q_rank",
    "tpa_kv_rank",
    "keep_last",
    "muon_num_ns_steps",
    "seed",
    "distributed_timeout_minutes",
)
"""Counts that are at least 1."""

AT_LEAST_0 = (
    "lr_warmup_iters",
    "lr_warmup_samples",
    "min_lr",
    "weight_decay",
    "clip_grad",
    "adam_eps",
    "mtp_loss_scaling_factor",
    "num_workers",
    "eval_iters",
    "exit_interval",
    "exit_duration_in_mins",
    "init_method_std",
    "embedding_init_method_std",
    "start_weight_decay",
    "end_weight_decay",
)

SHARES = (
    "adam_beta1",
    "adam_beta2",
    "lion_beta1",
    "lion_beta2",
    "sgd_momentum",
    "muon_momentum",
    "lr_warmup_fraction",
    "attention_dropout",
    "hidden_dropout",
)
"""Shares that are at least 0 and below 1."""


REQUIRED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "seq_length",
    "micro_batch_size",
    "lr",
)


def check_required(is_given: Callable[[str], bool]) -> None:
    """Refuse a run without one of the `REQUIRED` numbers, which have no defaults.

    Args:
        is_given: takes an argparse destination, returns whether the argument has a value.

    Raises:
        ValueError: one line that names the flag.
    """
    for name in REQUIRED:
        if not is_given(name):
            raise ValueError(f"{flag(name)} is missing; give it, or a preset with --config")


def check_numbers(args: Namespace) -> None:
    """Refuse numbers that are not finite, or out of the range of their flag.

    Raises:
        ValueError: one line that names the flag, the value and the range.
    """
    for name, value in vars(args).items():
        values = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(each, float) and not math.isfinite(each) for each in values):
            raise ValueError(f"{flag(name)} is {value}; it must be a finite number")
    for names, fits, said in (
        (POSITIVE, lambda value: value >= 1, "at least 1"),
        (AT_LEAST_0, lambda value: value >= 0, "at least 0"),
        (SHARES, lambda value: 0 <= value < 1, "at least 0 and below 1"),
        (("muon_extra_scale_factor",), lambda value: value > 0, "above 0"),
    ):
        for name in names:
            value = getattr(args, name, None)
            if value is not None and not fits(value):
                raise ValueError(f"{flag(name)} is {value}; it must be {said}")
    _check_warmup(args)
    _check_decay(args)


def _check_warmup(args: Namespace) -> None:
    """Refuse a warm-up that is not shorter than the schedule, in steps or in samples."""
    for unit, what in (("iters", "steps"), ("samples", "samples")):
        warmup = getattr(args, f"lr_warmup_{unit}")
        decay = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
        if decay and warmup >= decay:
            raise ValueError(
                f"--lr-warmup-{unit} {warmup} leaves nothing of the {decay} {what} the rate decays"
                f" over; use at most {decay - 1}"
            )


def _check_decay(args: Namespace) -> None:
    """Refuse a weight decay that falls, and a schedule WSD without the length of its last part."""
    begin, end = args.start_weight_decay, args.end_weight_decay
    if args.weight_decay_incr_style != "constant" and None not in (begin, end) and end < begin:
        raise ValueError(
            f"--end-weight-decay {end:g} is below --start-weight-decay {begin:g}, and Megatron's"
            " weight decay only grows; use at least the start's"
        )
    unit = "samples" if args.train_samples else "iters"
    if args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None:
        raise ValueError(
            f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}, the length of its decay at the end;"
            " add it"
        )
