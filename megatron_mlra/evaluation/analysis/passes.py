"""The passes over held-out text: one that measures every layer, and one per ablation.

Memory holds the inputs of all layers for one window, a block of attention scores and a block of
logits. A branch is ablated by setting its values to zero, without other changes to the computation:
if the values of a branch are zero already, the loss is unchanged to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_mlra.evaluation.analysis.layers import LayerSums

LOGITS_AT_ONCE = 2**25
"""Most logits held at a time: 128 MiB of float32."""

Window = tuple[np.ndarray, np.ndarray]
"""Inputs and targets, int64."""


def spread(windows: Sequence[Window], tokens: int) -> list[Window]:
    """Windows with about `tokens` tokens in total, at least one, spread evenly over all windows."""
    length = max(len(inputs) for inputs, _ in windows)
    count = min(len(windows), max(1, tokens // length))
    return [windows[i * len(windows) // count] for i in range(count)]


@dataclass
class Cost:
    """The cost of an ablation, by window."""

    losses: list[float] = field(default_factory=list)
    """Increase of the loss, in nats per token."""
    tokens: list[int] = field(default_factory=list)
    """Tokens of the window."""

    def result(self) -> dict[str, float | None]:
        """Mean over tokens, and the standard error over windows (None for one window)."""
        total = sum(loss * count for loss, count in zip(self.losses, self.tokens, strict=True))
        several = len(self.losses) > 1
        error = stdev(self.losses) / len(self.losses) ** 0.5 if several else None
        return {"loss": total / sum(self.tokens), "standard_error": error}


class Passes:
    """Runs a transformers model with latent attention over windows of text.

    Args:
        ablate: measure ablations too.
    """

    def __init__(self, model: Any, device: str, ablate: bool = True) -> None:
        self.model, self.device, self.ablate = model, device, ablate
        self.layers: nn.ModuleList = model.model.layers
        self.branches: int = model.config.num_branches
        self.sums = [LayerSums(layer.self_attn) for layer in self.layers]
        self.costs = [[Cost() for _ in range(self.branches)] for _ in self.layers]
        self.everywhere = [Cost() for _ in range(self.branches)]
        """The cost of ablating a branch in all layers, by branch."""
        self.losses: list[float] = []
        self.tokens: list[int] = []

    def steps(self) -> int:
        """Number of passes over one window."""
        return 1 + self.ablate * self.branches * (len(self.layers) + 1)

    @torch.inference_mode()
    def add(self, window: Window, done: Callable[[], Any]) -> None:
        """Measure one window; `done` is called after each of its `steps`.

        Raises:
            ValueError: the model's loss is not finite.
        """
        inputs, targets = (torch.from_numpy(part).to(self.device) for part in window)
        states, named = self._measured(inputs[None])
        base = self._loss(states[-1], targets)
        if not math.isfinite(base):
            raise ValueError(
                f"the model's loss is {base} on a window of {len(targets)} tokens; check its"
                " weights with mlra inspect, or use --dtype float32"
            )
        self.losses.append(base)
        self.tokens.append(len(targets))
        done()
        if not self.ablate:
            return
        every = range(len(self.layers))
        for branch in range(self.branches):
            for i in every:
                self._ablated(self.costs[i][branch], [i], branch, states[i], named, targets)
                done()
            self._ablated(self.everywhere[branch], every, branch, states[0], named, targets)
            done()

    def _ablated(
        self,
        cost: Cost,
        where: Sequence[int],
        branch: int,
        state: Tensor,
        named: dict[str, Any],
        targets: Tensor,
    ) -> None:
        """Add the cost of ablating a branch in the layers `where` to `cost`.

        Args:
            where: indices of layers, ascending.
            state: input of the first of these layers, `[1, s, d]`.
            named: keyword arguments of the layers.
        """
        with _without_branch([self.layers[i] for i in where], branch):
            for layer in self.layers[where[0] :]:
                state = layer(state, **named)
        cost.losses.append(self._loss(state, targets) - self.losses[-1])
        cost.tokens.append(len(targets))

    def _measured(self, inputs: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
        """Run the model and measure every attention.

        Returns:
            The input of each layer and the output of the last, `[1, s, d]`, and the keyword
            arguments of the layers.
        """
        states: list[Tensor] = []
        named: dict[str, Any] = {}

        def seen(_: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
            states.append(args[0])
            named.update(kwargs)

        def last(_: nn.Module, args: tuple[Any], output: Tensor) -> None:
            states.append(output)

        hooks = [layer.register_forward_pre_hook(seen, with_kwargs=True) for layer in self.layers]
        hooks.append(self.layers[-1].register_forward_hook(last))
        try:
            self.model.model(inputs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        for layer, sums, state in zip(self.layers, self.sums, states, strict=False):
            sums.add(layer.input_layernorm(state), named["cos_sin"])
        return states, named

    def _loss(self, state: Tensor, targets: Tensor) -> float:
        """Loss of a window in nats per token, from the last layer's output `[1, s, d]`."""
        hidden, total = self.model.model.norm(state)[0], 0.0
        step = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        for first in range(0, len(hidden), step):
            logits = self.model.lm_head(hidden[first : first + step]).float()
            picked = logits.log_softmax(-1).gather(-1, targets[first : first + step, None])
            total -= float(picked.double().sum())
        return total / len(targets)

    def result(self) -> dict[str, Any]:
        """All measurements as plain numbers."""
        layers = []
        for sums, costs in zip(self.sums, self.costs, strict=True):
            told = sums.result()
            if self.ablate:
                told["ablation"] = [cost.result() for cost in costs]
            layers.append(told)
        loss = sum(a * b for a, b in zip(self.losses, self.tokens, strict=True)) / sum(self.tokens)
        found: dict[str, Any] = {
            "windows": len(self.tokens),
            "tokens": sum(self.tokens),
            "loss": loss,
            "window_losses": self.losses,
            "layers": layers,
        }
        if self.ablate:
            found["ablation_in_all_layers"] = [cost.result() for cost in self.everywhere]
        return found


@contextmanager
def _without_branch(layers: Sequence[nn.Module], branch: int) -> Iterator[None]:
    """Inside the block W_UV of one branch is zero in these layers."""
    parts = []
    for layer in layers:
        module = layer.self_attn.kv_b_proj
        parts.append(module.weight.detach()[branch, :, module.sizes[0] :])
    kept = [part.clone() for part in parts]
    try:
        for part in parts:
            part.zero_()
        yield
    finally:
        for part, values in zip(parts, kept, strict=True):
            part.copy_(values)


def mean_off_diagonal(matrix: list[list[float]]) -> float | None:
    """Mean of the off-diagonal elements of an `[n, n]` matrix; None for n = 1."""
    others = [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j]
    return fmean(others) if others else None
