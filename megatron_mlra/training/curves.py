"""Curves: numbers over steps, in TensorBoard and, with `--wandb-project`, in Weights & Biases."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from megatron.training import get_tensorboard_writer, get_wandb_writer

LOSSES = ("lm loss",)
"""Names of the losses that steps.py reports in every step."""

LOGIT = "max_attention_logit"
"""Megatron's curve of the largest attention logit. Megatron adds a point in every step, also where
no logit was measured."""


def is_logged(args: Namespace, step: int) -> bool:
    """Whether a step has a line and points on the curves. The first step of a run has, since on a
    CPU many minutes may pass before the next."""
    return step == 1 or step % args.log_interval == 0 or step == args.train_iters


def record(values: Mapping[str, float], step: int) -> None:
    """Add a point to each curve; does nothing on ranks without writers."""
    if writer := get_tensorboard_writer():
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    if run := get_wandb_writer():
        run.log(dict(values), step)


def record_losses(means: Mapping[str, float], step: int, samples: int) -> None:
    """Add the mean losses of an interval, over steps and, in TensorBoard, over samples."""
    record(means, step)
    if writer := get_tensorboard_writer():
        for name, mean in means.items():
            writer.add_scalar(f"{name} vs samples", mean, samples)


def without_losses(get_writer: Callable[[], Any]) -> Callable[[], Any]:
    """Wrap Megatron's getter of a writer, so that the writer drops two kinds of points.

    Dropped are training losses of single steps, since the curves hold the means that are printed,
    and Megatron's points of the largest logit, since LogitWatch records those that were measured.
    """

    def get() -> Any:
        writer = get_writer()
        return None if writer is None else _WithoutLosses(writer)

    return get


_HIDDEN = {*LOSSES, *(f"{name} vs samples" for name in LOSSES), LOGIT}


class _WithoutLosses:
    """TensorBoard's writer, or wandb, without the curves of `LOSSES` and `LOGIT`."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def add_scalar(self, name: str, *rest: Any, **named: Any) -> None:
        if name not in _HIDDEN:
            self._writer.add_scalar(name, *rest, **named)

    def log(self, values: dict[str, Any], *rest: Any, **named: Any) -> None:
        if kept := {name: value for name, value in values.items() if name not in _HIDDEN}:
            self._writer.log(kept, *rest, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)
