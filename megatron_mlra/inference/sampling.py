"""Choosing the next token: greedy, temperature, top-k, top-p, and what stops a request."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mlra.inference.checks import real, shown, whole

SEEDS = (-(2**63), 2**64 - 1)
"""The least and the largest seed: the range of 64-bit integers, signed or unsigned."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen.

    Raises:
        ValueError: a value of the wrong type or out of range; the message names a valid one.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities reach p together (after top_k)."""
    seed: int = 0
    """A draw depends on the seed and the token's position alone, not on the rest of the batch."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the request, and are part of its output. A single int is one token."""
    stop: tuple[str, ...] = ()
    """Texts that end the request; the output ends in front of them. A single str is one text."""
    logprobs: bool = False
    """Report each token's log-probability under the model (before temperature and cuts)."""

    def __post_init__(self) -> None:
        """Check every field, and store it as the type that the field names."""
        warmth, share = "0 (greedy) or more, at least 1.2e-38", "more than 0, at most 1"
        checked = {
            "max_new_tokens": whole("max_new_tokens", self.max_new_tokens),
            "temperature": real("temperature", self.temperature, warmth),
            "top_k": whole("top_k", self.top_k, 0),
            "top_p": real("top_p", self.top_p, f"{share} (in float32: at least 1.2e-38)"),
            "seed": whole("seed", self.seed, *SEEDS),
            "stop_ids": tuple(
                whole("a token of stop_ids", token, 0) for token in _listed(self, "stop_ids", int)
            ),
            "stop": _listed(self, "stop", str),
        }
        for name, good, fix in (
            ("temperature", checked["temperature"] >= 0, warmth),
            ("top_p", 0 < checked["top_p"] <= 1, share),
            (
                "stop",
                all(isinstance(text, str) and text for text in checked["stop"]),
                "texts that are not empty",
            ),
            ("logprobs", isinstance(self.logprobs, bool), "True or False"),
        ):
            if not good:
                raise ValueError(f"{name} is {shown(getattr(self, name))}; use {fix}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def _listed(params: SamplingParams, name: str, single: type) -> tuple:
    """A field's values as a tuple; a value of the type `single` becomes a tuple of one."""
    value = getattr(params, name)
    if isinstance(value, single):
        return (value,)
    if not isinstance(value, Collection) or isinstance(value, str | bytes | Mapping):
        raise ValueError(
            f"{name} is {shown(value)}; use a tuple of {single.__name__}, or a single one"
        )
    return tuple(value)


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) for a request's token at `position`."""
    return random.Random(f"{seed}:{position}").random()


def sample(
    logits: Tensor, params: list[SamplingParams], positions: list[int]
) -> tuple[list[int], list[float] | None]:
    """One token per row, by inversion of the cumulative distribution after temperature and cuts.

    Args:
        logits: `[b, vocab]` float32.
        params, positions: one per row; seed and position determine the row's draw.

    Returns:
        Tokens, -1 for a row whose largest logit is NaN or infinite; and the tokens' natural
        log-probabilities, or None if no row asks for them.
    """
    sound = logits.amax(-1).isfinite()
    # NaN or infinite rows would break the gather of the draws.
    logits = torch.where(sound[:, None], logits, 0.0)
    if all(p.temperature == 0 for p in params):
        chosen = logits.argmax(-1)
    else:
        chosen = _draw(logits, params, positions)
    logprobs = None
    if any(p.logprobs for p in params):
        logprobs = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0].tolist()
    return torch.where(sound, chosen, -1).tolist(), logprobs


def _draw(logits: Tensor, params: list[SamplingParams], positions: list[int]) -> Tensor:
    device, vocab = logits.device, logits.size(-1)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).to(device)[:, None]

    # A greedy row keeps the likeliest token alone, so any temperature serves.
    temperature = column([p.temperature or 1.0 for p in params])
    top_k = column([1 if p.temperature == 0 else min(p.top_k or vocab, vocab) for p in params])
    top_p = column([p.top_p for p in params])
    draws = column([uniform(p.seed, at) for p, at in zip(params, positions, strict=True)])
    # Stable: equal logits keep the order of their ids, as argmax does.
    ordered, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    # Shifted so that the largest logit is 0: a tiny temperature cannot overflow float32.
    probabilities = ((ordered - ordered[:, :1]) / temperature).softmax(-1)
    rank = torch.arange(vocab, device=device)
    probabilities = probabilities.masked_fill(rank >= top_k, 0.0)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill((before >= top_p) & (rank > 0), 0.0)
    sums = probabilities.cumsum(-1)
    index = torch.searchsorted(sums, draws * sums[:, -1:], right=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return ids.gather(-1, torch.minimum(index, last))[:, 0]
