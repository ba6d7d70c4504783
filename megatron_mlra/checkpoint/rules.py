"""Rules of a name table: how one canonical tensor is stored elsewhere, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mlra.checkpoint.description import ModelDescription
from megatron_mlra.checkpoint.names import expected_tensors


@dataclass(frozen=True)
class Rule:
    """How one canonical tensor is stored there: as one tensor or as several."""

    theirs: tuple[str, ...]
    split: Callable[[Tensor], list[Tensor]]
    """Canonical -> theirs."""

    join: Callable[[list[Tensor]], Tensor]
    """Theirs -> canonical."""


def same(name: str) -> Rule:
    """The tensor as it is, under another name."""
    return Rule((name,), lambda tensor: [tensor], lambda parts: parts[0])


def rows(*names: str) -> Rule:
    """Equal blocks of rows."""
    return Rule(names, lambda tensor: list(tensor.chunk(len(names))), torch.cat)


def grouped_queries(model: ModelDescription, *names: str) -> Rule:
    """Megatron's `linear_qkv` as tensors of queries, gates (gated models), keys and values.

    Megatron's rows are interleaved by query group: its queries, gates, one key, one value.
    """
    g, c, d = model.num_query_groups, model.head_dim, model.hidden_size
    j = model.num_attention_heads // g
    heads = [j, j, 1, 1] if model.output_gate else [j, 1, 1]

    def split(qkv: Tensor) -> list[Tensor]:
        parts = qkv.view(g, sum(heads), c, d).split(heads, dim=1)
        return [part.reshape(-1, d) for part in parts]

    def join(parts: list[Tensor]) -> Tensor:
        blocks = [part.view(g, n, c, d) for part, n in zip(parts, heads, strict=True)]
        return torch.cat(blocks, dim=1).view(-1, d)

    return Rule(names, split, join)


def their_shapes(model: ModelDescription, table: Mapping[str, Rule]) -> dict[str, tuple[int, ...]]:
    """Their name -> shape, in canonical order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in expected_tensors(model).items():
        parts = table[name].split(torch.empty(shape, device="meta"))
        shapes |= {
            their: tuple(part.shape) for their, part in zip(table[name].theirs, parts, strict=True)
        }
    return shapes
