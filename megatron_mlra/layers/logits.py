"""What a core keeps of the logits it has seen, and how a layer's weights follow from them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from torch import Tensor

from megatron_mlra.maths.logits import Shrink
from megatron_mlra.sharding.placement import training_share


class LargestLogits:
    """The largest logit of each query head of one core since it was last taken.

    Off unless asked for: then a core neither computes nor keeps anything.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._found: Tensor | None = None

    def wanted_of(self, core: torch.nn.Module) -> bool:
        """Whether the core is to report this pass: one of training, and not its repetition by
        recomputation, which sees the same logits."""
        repeats = is_checkpointing() and torch.is_grad_enabled()
        return self.wanted and core.training and not repeats

    def add(self, largest: Tensor) -> None:
        """Take in those of a micro-batch, `[heads]`."""
        largest = largest.detach()
        self._found = largest if self._found is None else torch.maximum(self._found, largest)

    def take(self) -> Tensor | None:
        """`[heads]`, None where nothing was seen; begins anew."""
        found, self._found = self._found, None
        return found


def measured(chunk: torch.nn.Module) -> Iterator[tuple[int, torch.nn.Module]]:
    """The attentions of a model chunk whose cores report their logits, each behind its place among
    the model's layers: the decoder's first, then those of multi-token prediction."""
    for name, module in chunk.named_modules():
        core = getattr(module, "core_attention", None)
        if isinstance(getattr(core, "largest", None), LargestLogits):
            first = module.config.num_layers if ".mtp.layers." in f".{name}" else 0
            yield first + module.layer_number - 1, module


Row = tuple[torch.nn.Parameter, Tensor]
"""A weight, and a factor for each row of it: all axes but the last, counted through. A vector's
numbers are its rows."""


def row_factors(attention: torch.nn.Module, factors: Shrink) -> Iterator[Row]:
    """The weights of an MLRASelfAttention that QK-clip scales, and by what, in float64.

    A norm of query heads undoes whatever scales the projection before it, so that then the norm's
    weight takes the query's factors.

    Args:
        factors: of all branches and heads; the layout says which of them the rank's weights serve.
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
