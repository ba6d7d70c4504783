"""Global batch sizes that change within a run: Megatron's `--step-batch-size-schedule`.

    --train-samples 1000000 --step-batch-size-schedule "0:128 2B:256 10B:512"

From each number of tokens on, steps have that many sequences. Megatron counts the rates in steps of
its smallest batch where a run's length is in steps, so the length has to be in samples.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable

from megatron_mlra.command_line.parser import flag, say

NAME = "step_batch_size_schedule"
FORM = 'TOKENS:SEQUENCES from 0 on, such as "0:128 2B:256"'
_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def stages(text: str, seq_length: int) -> list[tuple[int, int]]:
    """Read a schedule as Megatron does.

    Args:
        text: the value of `--step-batch-size-schedule`.
        seq_length: tokens of a sample.

    Returns:
        samples from which on a global batch size holds, and that size; both grow or change.

    Raises:
        ValueError: one line that names the entry and the form.
    """
    found: list[tuple[int, int]] = []
    for entry in text.replace(",", " ").split():
        tokens, separator, batch = entry.partition(":")
        start, size = _number(tokens), _number(batch)
        if not separator or start is None or not size:
            raise ValueError(f"{flag(NAME)}: {entry!r:.60} is no {FORM}")
        found.append((start // seq_length, size))
    found.sort(key=lambda stage: stage[0])
    starts = [start for start, _ in found]
    if not found or starts[0] != 0 or len({*starts}) < len(starts):
        raise ValueError(
            f"{flag(NAME)} {text!r:.60} must have one entry at 0 and further ones at least a"
            f" sequence of {seq_length} tokens apart; use {FORM}"
        )
    return found


def _number(text: str) -> int | None:
    """A number with or without K, M, B or T; None for what is none, and below 0."""
    text = text.strip().upper()
    factor = _SUFFIXES.get(text[-1:], 1)
    try:
        value = float(text.removesuffix(text[-1:]) if factor > 1 else text) * factor
    except ValueError:
        return None
    return int(value) if math.isfinite(value) and value >= 0 else None


def settle(args: Namespace, given: set[str]) -> None:
    """Let a schedule replace a preset's batch size, or the command line's batch size a preset's
    schedule. Validation keeps the batch size. In place.

    Args:
        given: the flags of the command line.

    Raises:
        ValueError: the command line gives both.
    """
    text = getattr(args, NAME)
    if text is None:
        return
    if "--global-batch-size" in given:
        if flag(NAME) in given:
            raise ValueError(
                f"--global-batch-size {args.global_batch_size} and {flag(NAME)} {text!r:.60}"
                " exclude each other; give one"
            )
        setattr(args, NAME, None)
        return
    args.eval_global_batch_size = args.eval_global_batch_size or args.global_batch_size
    args.global_batch_size = None
    args._is_global_batch_size_explicitly_specified = False  # what Megatron noted of the preset's


def check(args: Namespace, replicas: int) -> None:
    """Refuse a schedule that does not fit the micro-batches or the length of the run.

    Args:
        replicas: data-parallel ranks.

    Raises:
        ValueError: one line that names the flag, the value and the fix.
    """
    text = getattr(args, NAME)
    if text is None:
        return
    found = stages(text, args.seq_length)
    share = args.micro_batch_size * replicas
    for _, batch in found:
        if batch % share:
            raise ValueError(
                f"{flag(NAME)}: {batch} does not divide into micro-batches of"
                f" {args.micro_batch_size} on {replicas} data-parallel ranks; use"
                f" {-(-batch // share) * share}, or another --micro-batch-size"
            )
    if not args.train_samples:
        if args.train_iters is None:
            return  # --skip-train
        raise ValueError(
            f"{flag(NAME)} needs the run's length in samples, by which its rates change; use"
            f" --train-samples {_samples_of(found, args.train_iters)} for {args.train_iters} steps"
        )
    _, whole = _run(found, args.train_samples)
    if whole != args.train_samples:
        raise ValueError(
            f"--train-samples {args.train_samples} ends within a step of {flag(NAME)}; use {whole}"
        )


def steps(args: Namespace) -> int | None:
    """Steps of a run with a schedule; None without one."""
    if getattr(args, NAME) is None or not args.train_samples:
        return None
    return _run(stages(getattr(args, NAME), args.seq_length), args.train_samples)[0]


def count_from_checkpoint(load_checkpoint: Callable, args: Namespace) -> Callable:
    """Megatron's `load_checkpoint`; then `args.train_iters` counts the steps that the rest of
    `--train-samples` takes, and those of the checkpoint. Megatron counts as if the steps before had
    had this run's batch size, and so trains on too few or too many samples. Rank 0 says so."""

    def load(*rest, **named):
        result = load_checkpoint(*rest, **named)
        if args.train_samples and result[0]:
            left = steps_left(args, args.consumed_train_samples)
            before, args.train_iters = args.train_iters, result[0] + left
            if args.rank == 0 and before != args.train_iters:
                say(
                    f"note: steps before had another batch size; the last step of --train-samples"
                    f" {args.train_samples} is {args.train_iters:,}, not {before:,}"
                )
        return result

    return load


def steps_left(args: Namespace, seen: int) -> int:
    """Whole steps that `--train-samples` still has behind `seen` samples."""
    if getattr(args, NAME) is None:
        return max(0, args.train_samples - seen) // args.global_batch_size
    found = stages(getattr(args, NAME), args.seq_length)
    count, whole = _run(found, args.train_samples, seen)
    return count - (whole > max(seen, args.train_samples))


def sizes(args: Namespace) -> tuple[int, int]:
    """The smallest and the largest global batch size of a run."""
    if getattr(args, NAME) is None:
        return args.global_batch_size, args.global_batch_size
    found = [batch for _, batch in stages(getattr(args, NAME), args.seq_length)]
    return min(found), max(found)


def _run(found: list[tuple[int, int]], total: int, seen: int = 0) -> tuple[int, int]:
    """Steps behind `seen` samples of a run of at least `total`, and its samples in whole steps."""
    count = 0
    ends = [start for start, _ in found[1:]] + [total]
    for (_, batch), end in zip(found, ends, strict=True):
        more = max(0, -(-(min(end, total) - seen) // batch))
        count, seen = count + more, seen + more * batch
    return count, seen


def _samples_of(found: list[tuple[int, int]], total: int) -> int:
    """Samples of a run of `total` steps."""
    seen, left = 0, total
    ends = [start for start, _ in found[1:]] + [None]
    for (_, batch), end in zip(found, ends, strict=True):
        more = left if end is None else min(left, max(0, -(-(end - seen) // batch)))
        seen, left = seen + more * batch, left - more
    return seen
