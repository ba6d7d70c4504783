"""A run's length and schedule, in one unit: steps or samples. Megatron refuses a mixture.

Values of the command line win. A preset's values in the other unit are converted, and a preset's
other kind of warm-up is dropped.
"""

from __future__ import annotations

import math
from argparse import Namespace

from megatron_mlra.command_line.parser import flag, say

LENGTHS = ("train_iters", "train_samples")
PAIRS = (
    ("lr_warmup_iters", "lr_warmup_samples", 0),
    ("lr_decay_iters", "lr_decay_samples", None),
    ("lr_wsd_decay_iters", "lr_wsd_decay_samples", None),
)
"""Argument in steps, argument in samples, and the value that means "not given"."""
UNITS = ("steps", "samples")


def settle(args: Namespace, given: set[str]) -> None:
    """Convert the schedule in `args` to one unit, in place.

    Args:
        given: the flags of the command line, as opposed to a preset's.

    Raises:
        ValueError: the command line uses both units, or two kinds of warm-up; the line gives the
            value in the right unit.
    """
    lengths = [name for name in LENGTHS if flag(name) in given]
    if len(lengths) == 2:
        raise _exclude(args, *LENGTHS)
    in_samples = bool(args.train_samples) and not args.train_iters
    unit = LENGTHS.index(lengths[0]) if lengths else int(in_samples)
    if lengths:
        setattr(args, LENGTHS[1 - unit], None)
    batch = args.global_batch_size or (args.micro_batch_size or 1) * _replicas(args)
    for *names, none in PAIRS:
        ours, other = names[unit], names[1 - unit]
        count = getattr(args, other)
        if not count:
            continue
        converted = count * batch if unit else -(-count // batch)
        if flag(other) in given:
            raise ValueError(
                f"{flag(other)} {count} counts {UNITS[1 - unit]} and {flag(LENGTHS[unit])}"
                f" {UNITS[unit]}; use {flag(ours)} {converted}"
            )
        setattr(args, other, none)
        if flag(ours) not in given:
            setattr(args, ours, converted)
    if args.lr_warmup_fraction is not None:
        warmup = PAIRS[0][unit]
        if flag(warmup) not in given:
            setattr(args, warmup, 0)
        elif flag("lr_warmup_fraction") in given:
            raise _exclude(args, "lr_warmup_fraction", warmup)
        else:
            args.lr_warmup_fraction = None
    _fit_warmup(args, given, LENGTHS[unit], PAIRS[0][unit])


def _replicas(args: Namespace) -> int:
    """Data-parallel ranks. Without `--global-batch-size` each takes one micro-batch a step."""
    cuts = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    return max(1, args.world_size // max(1, math.prod(getattr(args, name) for name in cuts)))


def _fit_warmup(args: Namespace, given: set[str], length: str, warmup: str) -> None:
    """Shorten a preset's warm-up that is as long as the command line's run, to a tenth of the run.

    Rank 0 prints a note.
    """
    steps, before = getattr(args, length), getattr(args, warmup) or 0
    if flag(length) not in given or flag(warmup) in given or not steps or before < steps:
        return
    setattr(args, warmup, steps // 10)
    if args.rank == 0:
        say(
            f"note: the preset's {flag(warmup)} {before:,} does not fit into {flag(length)}"
            f" {steps:,}; {steps // 10:,} is used"
        )


def _exclude(args: Namespace, one: str, other: str) -> ValueError:
    said = " and ".join(f"{flag(name)} {getattr(args, name)}" for name in (one, other))
    return ValueError(f"{said} exclude each other; give one")


def check(args: Namespace) -> None:
    """Refuse a warm-up, or a weight decay, that does not fit the other numbers of the schedule.

    Raises:
        ValueError: one line that names the flag, the value and the fix.
    """
    _check_warmup(args)
    _check_decay(args)
    _check_rates(args)


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
    if args.lr_decay_style != "WSD":
        return
    unit = "samples" if args.train_samples else "iters"
    last = getattr(args, f"lr_wsd_decay_{unit}")
    if last is None:
        raise ValueError(
            f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}, the length of its decay at the end;"
            " add it"
        )
    whole = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    warmup = getattr(args, f"lr_warmup_{unit}")
    if args.lr_warmup_fraction is not None and whole:
        warmup = math.ceil(args.lr_warmup_fraction * whole)
    if whole and last > whole - warmup:
        raise ValueError(
            f"--lr-wsd-decay-{unit} {last} would begin before the warm-up ends: {whole - warmup} of"
            f" the schedule's {whole} are left behind it; use at most {whole - warmup}"
        )


def _check_rates(args: Namespace) -> None:
    """Refuse a first rate of the warm-up, or a last rate of embeddings and output layer, that is
    above the highest one, and a last one that nothing would have."""
    if args.lr_warmup_init > args.lr:
        raise ValueError(
            f"--lr-warmup-init {args.lr_warmup_init:g} is above --lr {args.lr:g}; use at most --lr"
        )
    rate, last = args.decoupled_lr, args.decoupled_min_lr
    if rate is None and last is not None:
        raise ValueError(
            f"--decoupled-min-lr {last:g} has no effect without --decoupled-lr; add it"
        )
    shown, last = ("--min-lr", args.min_lr) if last is None else ("--decoupled-min-lr", last)
    if rate is not None and (last or 0) > rate:
        raise ValueError(
            f"{shown} {last:g} is above --decoupled-lr {rate:g}, so that the rate would rise; use"
            f" --decoupled-min-lr {rate / 10:g}"
        )
