"""Rules of a name table: how another format stores a canonical tensor, and how to read it back."""

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
    """How another format stores one canonical tensor: as one tensor or as several."""

    theirs: tuple[str, ...]
    """The other format's names."""
    split: Callable[[Tensor], list[Tensor]]
    """Canonical tensor -> the other format's tensors, in the order of `theirs`."""
    join: Callable[[list[Tensor]], Tensor]
    """The inverse of `split`."""

    def store(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the other format, for each part of a canonical tensor."""
        return zip(self.theirs, self.split(tensor), strict=True)


def same(name: str) -> Rule:
    """The rule of a tensor that only has another name."""
    return Rule((name,), lambda tensor: [tensor], lambda parts: parts[0])


def rows(*names: str) -> Rule:
    """The rule of a tensor that is stored as equal blocks of rows."""
    return Rule(names, lambda tensor: list(tensor.chunk(len(names))), torch.cat)


def grouped_queries(model: ModelDescription, *names: str) -> Rule:
    """The rule of Megatron's `linear_qkv` `[(h + 2 g) c, d]` as tensors of queries, gates (in gated
    models), keys and values, each `[heads c, d]`.

    Megatron's rows are ordered by query group: the group's queries, its gates, one key, one value.
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
        layer: maps a layer's number to its rules, by canonical name without the layer's prefix.
        embedding, final_norm, output: the other format's names of tensors outside the layers.
        prefix: the other format's prefix of a layer, with `{}` for its number.
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
    """The other format's names -> shapes, in canonical order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in expected_tensors(model).items():
        parts = table[name].store(torch.empty(shape, device="meta"))
        shapes |= {their: tuple(part.shape) for their, part in parts}
    return shapes
