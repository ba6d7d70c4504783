"""Choosing the next token: greedy, temperature, top-k, top-p, and what stops a request."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen.

    Raises:
        ValueError: a value that means nothing, with one that does.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities reach p together (after top_k)."""
    seed: int = 0
    """Draws depend on it and on the position alone, not on what else is in the batch."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the request (and are part of its output)."""
    stop: tuple[str, ...] = ()
    """Texts that end the request; the output ends in front of them."""
    logprobs: bool = False
    """Report each token's log-probability under the model (before temperature and cuts)."""

    def __post_init__(self) -> None:
        for name, good, fix in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            (
                "temperature",
                math.isfinite(self.temperature) and self.temperature >= 0,
                "0 (greedy) or more",
            ),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("stop", all(self.stop), "texts that are not empty"),
        ):
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {fix}")


def uniform(seed: int, position: int) -> float:
    """The draw in [0, 1) of a request's token at `position`."""
    return random.Random(f"{seed}:{position}").random()


def sample(
    logits: Tensor, params: list[SamplingParams], positions: list[int]
) -> tuple[list[int], list[float] | None]:
    """One token a row, by inversion of the cut distribution's sum.

    Args:
        logits: `[b, vocab]` float32.
        params, positions: of each row; the position seeds its draw.

    Returns:
        tokens, and their log-probabilities where any row asks for them.
    """
    if all(p.temperature == 0 for p in params):
        chosen = logits.argmax(-1)
    else:
        chosen = _draw(logits, params, positions)
    logprobs = None
    if any(p.logprobs for p in params):
        logprobs = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0].tolist()
    return chosen.tolist(), logprobs


def _draw(logits: Tensor, params: list[SamplingParams], positions: list[int]) -> Tensor:
    device, vocab = logits.device, logits.size(-1)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).to(device)[:, None]

    # A greedy row keeps its first token alone, so its temperature may be anything.
    temperature = column([p.temperature or 1.0 for p in params])
    top_k = column([1 if p.temperature == 0 else p.top_k or vocab for p in params])
    top_p = column([p.top_p for p in params])
    draws = column([uniform(p.seed, at) for p, at in zip(params, positions, strict=True)])
    # Stable: equal logits keep the order of their ids, as argmax does.
    ordered, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    probabilities = (ordered / temperature).softmax(-1)
    rank = torch.arange(vocab, device=device)
    probabilities = probabilities.masked_fill(rank >= top_k, 0.0)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    sums = probabilities.cumsum(-1)
    index = torch.searchsorted(sums, draws * sums[:, -1:], right=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return ids.gather(-1, torch.minimum(index, last))[:, 0]
