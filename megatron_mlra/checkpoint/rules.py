"""Rules of a name table: how one canonical tensor is stored elsewhere, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.tensors import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    expected_tensors,
    layer_prefix,
)


@dataclass(frozen=True)
class Rule:
    """How one canonical tensor is stored there: as one tensor or as several."""

    theirs: tuple[str, ...]
    split: Callable[[Tensor], list[Tensor]]
    """Canonical -> theirs."""

    join: Callable[[list[Tensor]], Tensor]
    """Theirs -> canonical."""

    def store(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Their names, each with its part of the canonical tensor."""
        return zip(self.theirs, self.split(tensor), strict=True)


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


def whole_table(
    model: ModelDescription,
    layer: Callable[[int], Mapping[str, Rule]],
    *,
    embedding: str,
    prefix: str,
    final_norm: str,
    output: str,
) -> dict[str, Rule]:
    """Canonical name -> rule, for every tensor of the model, in canonical order.

    Args:
        layer: number of a layer -> its rules, by canonical name behind its prefix.
        embedding, final_norm, output: their names outside the layers.
        prefix: theirs of a layer, with `{}` for its number.
    """
    table = {EMBEDDING: same(embedding)}
    for i in range(model.num_layers):
        table |= under(layer(i), layer_prefix(i), prefix.format(i))
    table[FINAL_NORM] = same(final_norm)
    if not model.tie_embeddings:
        table[OUTPUT] = same(output)
    return table


def under(table: Mapping[str, Rule], ours: str, theirs: str) -> dict[str, Rule]:
    """The table with a prefix to our names and to theirs."""
    return {
        ours + name: Rule(tuple(theirs + their for their in rule.theirs), rule.split, rule.join)
        for name, rule in table.items()
    }


def their_shapes(model: ModelDescription, table: Mapping[str, Rule]) -> dict[str, tuple[int, ...]]:
    """Their name -> shape, in canonical order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in expected_tensors(model).items():
        parts = table[name].store(torch.empty(shape, device="meta"))
        shapes |= {their: tuple(part.shape) for their, part in parts}
    return shapes
