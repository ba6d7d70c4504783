"""A core's record of its largest logits, and the factors by which QK-clip scales weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from torch import Tensor

from megatron_mlra.maths.logits import Shrink
from megatron_mlra.sharding.placement import training_share


class LargestLogits:
    """The largest logit of each query head of one core since the last `take`.

    While `wanted` is False, the default, the core neither computes nor keeps logits.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._found: Tensor | None = None

    def wanted_of(self, core: torch.nn.Module) -> bool:
        """Whether the core is to report this pass: a training pass that does not repeat another.
        The repetition by recomputation has the same logits."""
        repeats = is_checkpointing() and torch.is_grad_enabled()
        return self.wanted and core.training and not repeats

    def add(self, largest: Tensor) -> None:
        """Take in the largest logits of a micro-batch, `[heads]`."""
        largest = largest.detach()
        self._found = largest if self._found is None else torch.maximum(self._found, largest)

    def take(self) -> Tensor | None:
        """The record `[heads]`, or None if no pass was reported; empties the record."""
        found, self._found = self._found, None
        return found


def measured(chunk: torch.nn.Module) -> Iterator[tuple[int, torch.nn.Module]]:
    """The attentions of a model chunk whose cores can report logits, as (layer number, attention).
    Numbers count the decoder's layers first, then those of multi-token prediction, from 0."""
    for name, module in chunk.named_modules():
        core = getattr(module, "core_attention", None)
        if isinstance(getattr(core, "largest", None), LargestLogits):
            first = module.config.num_layers if ".mtp.layers." in f".{name}" else 0
            yield first + module.layer_number - 1, module


Row = tuple[torch.nn.Parameter, Tensor]
"""A weight, and one factor per row. All axes but the last count as rows; of a vector, every
number is a row."""


def row_factors(attention: torch.nn.Module, factors: Shrink) -> Iterator[Row]:
    """The weights of an MLRASelfAttention that QK-clip scales, and their factors in float64.

    A norm of query heads would undo a scaling of the query projection, so with `query_head_norm`
    the norm's weight takes the query's factors.

    Args:
        factors: of all branches and heads. The layout says which of them serve the rank's weights.
    """
    config, shard = attention.config, attention.shard
    share = training_share(config, shard)
    d_h, d_r, d_v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    own = (factors.nope[share.heads], factors.rope[share.heads])
    queries = torch.cat([f[:, None].expand(-1, n) for f, n in zip(own, (d_h, d_r), strict=True)], 1)
    name = "linear_q_proj" if config.q_lora_rank is None else "linear_q_up_proj"
    if config.query_head_norm:
        name = "query_head_norm"
    yield getattr(attention, name).weight, queries.flatten()
    keys = factors.key[share.branches, share.core_heads, None]  # [n, h_c, 1]
    keys = torch.cat((keys.expand(-1, -1, d_h), torch.ones_like(keys).expand(-1, -1, d_v)), 2)
    yield attention.linear_kv_up_proj.weight, keys.flatten()
