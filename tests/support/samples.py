"""What the tiny model of tests reads: tokens drawn from a step's number, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VOCAB, SEQ, BATCH = 128, 32, 2


@dataclass(frozen=True)
class Sizes:
    """What a model reads: vocabulary, tokens of a sequence, sequences of a step."""

    vocab: int = VOCAB
    seq: int = SEQ
    batch: int = BATCH
    chain: int | None = None
    """If given, a token mostly follows from the one before, out of that many (see `chained`). Then
    there is something to learn, and no step's tokens come again."""


DEFAULT = Sizes()


def global_batch(seed: int, sizes: Sizes = DEFAULT) -> Tensor:
    """Tokens `[batch, seq + 1]`, the same on every rank."""
    draw = torch.Generator().manual_seed(100 + seed)
    if sizes.chain:
        return chained(draw, sizes)
    return torch.randint(sizes.vocab, (sizes.batch, sizes.seq + 1), generator=draw)


def chained(draw: torch.Generator, sizes: Sizes) -> Tensor:
    """Tokens `[batch, seq + 1]`, each the successor of the one before in a ring of `chain` tokens
    with probability 3/4, else any of the ring.

    So the best loss is the entropy of that choice, 1.6 nats for a ring of 64, at any step.
    """
    shape, ring = (sizes.batch, sizes.seq + 1), sizes.chain
    jumps = torch.randint(ring, shape, generator=draw)
    follows = torch.rand(shape, generator=draw) < 0.75
    places = torch.where(follows, torch.ones_like(jumps), jumps).cumsum(1) % ring
    # The ring's tokens lie all over the vocabulary, so that every tensor-parallel rank has some.
    return places * (sizes.vocab // ring)
