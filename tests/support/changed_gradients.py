"""Gradients changed before the optimizer: by rounding, which a comparison of training runs must
pass, and by faults, which it must find."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

NOISE = 3e-2
"""Distance of a rehearsed gradient from its own, as far as the layouts of two GPUs are in bf16."""


def add_noise(step: int, name: str, gradient) -> None:
    """Rounding, as large as the layouts' in bf16."""
    import torch

    noise = torch.randn_like(gradient)
    gradient += NOISE * noise * gradient.norm() / noise.norm()


def double(step: int, name: str, gradient) -> None:
    """A gradient that two ranks have both summed."""
    if name.endswith("linear_proj.weight"):
        gradient *= 2


def stop(step: int, name: str, gradient) -> None:
    """A weight that no longer learns, from the third step on."""
    if step >= 2 and "word_embeddings" in name:
        gradient.zero_()


def flip(step: int, name: str, gradient) -> None:
    """A gradient of the wrong sign, from the third step on."""
    if step >= 2 and name.endswith("linear_fc2.weight"):
        gradient.neg_()


CHANGES = {"noise": add_noise, "double": double, "stop": stop, "flip": flip}


def change_gradients(tiny, change: Callable[[int, str, Any], None]) -> None:
    """Call `change` with a step's number, a parameter's name and its gradient, before each step of
    the optimizer."""
    finalize, steps = tiny.config.finalize_model_grads_func, itertools.count()

    def changed(*args, **kwargs) -> None:
        finalize(*args, **kwargs)
        step = next(steps)
        for name, parameter in tiny.chunks[0].module.named_parameters():
            change(step, name, parameter.main_grad)

    tiny.config.finalize_model_grads_func = changed
