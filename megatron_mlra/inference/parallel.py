"""Tensor-parallel decoding: what a rank owns, and the collectives of a step.

The `latent` layout of partition.py: a rank caches its own latent heads and attends with all query
heads they serve; where the ranks outnumber the latents, those of one latent split its heads. Ranks
that work on the same heads in different branches form an **exchange group** (min(N, tp) ranks).

Letters: h query heads, N branches, L latent heads, h_c heads of this rank's core, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mlra.checkpoint.description import ModelDescription
from megatron_mlra.inference.checks import whole
from megatron_mlra.partition import LatentShard

WEIGHT_MODES = ("replicated", "sharded")
"""'replicated': a rank holds W_UQ and W_O of all heads it attends with, one all-reduce a layer.
'sharded': h / tp heads of both, an all-gather of queries and a reduce-scatter of outputs more."""


@dataclass(frozen=True)
class HeadShard:
    """One rank's heads: those its core attends with, and those whose W_UQ and W_O it holds."""

    core: LatentShard
    own_heads: int
    """Heads whose query and output projections this rank holds."""
    own_start: int
    exchange: tuple[int, ...]
    """Tensor-parallel ranks that hold the other parts of this core's heads, in head order."""

    @classmethod
    def plan(cls, model: ModelDescription, tp: int, rank: int, weight_mode: str) -> HeadShard:
        """The share of `rank`.

        Raises:
            ValueError: for a size this model cannot be cut into, naming the sizes that work.
        """
        if weight_mode not in WEIGHT_MODES:
            raise ValueError(f"weight mode is {weight_mode!r}; use one of {WEIGHT_MODES}")
        check_tensor_parallel(model, tp)
        core = LatentShard.plan(model, tp, rank, "latent")
        span = max(1, tp // model.num_branches)
        exchange = tuple(range(rank % span, tp, span))
        if weight_mode == "replicated":
            return cls(core, core.heads, core.head_start, exchange)
        own = core.heads // len(exchange)
        return cls(core, own, core.head_start + exchange.index(rank) * own, exchange)


def check_tensor_parallel(model: ModelDescription, tp: int) -> None:
    """Raise ValueError, with the sizes that work, unless `model` can be cut over `tp` ranks."""
    tp = whole("tensor parallel size", tp)
    if not _fits(model, tp):
        works = [n for n in range(1, 129) if _fits(model, n)]
        h = model.num_attention_heads
        kind = (
            f"num_query_groups {model.num_query_groups}"
            if model.attention == "gqa"
            else f"num_latent_heads {model.num_latent_heads}, num_branches {model.num_branches}"
        )
        raise ValueError(
            f"tensor parallel size {tp} does not fit {model.variant} ({h} heads, {kind}); use one"
            f" of {', '.join(map(str, works))}"
        )


def _fits(model: ModelDescription, tp: int) -> bool:
    counts = (
        (model.num_query_groups,)
        if model.attention == "gqa"
        else (model.num_latent_heads, model.num_branches)
    )
    return model.num_attention_heads % tp == 0 and all(n % tp == 0 or tp % n == 0 for n in counts)


class TensorParallel:
    """The collectives of one rank.

    Args:
        size, rank: of the tensor-parallel group.
        group: process group; None without one, or for one rank's share run on its own.
        exchange_group: the ranks of `HeadShard.exchange`.

    Raises:
        ValueError: no whole number of at least 1 as the size, or a rank that is not below it.
    """

    def __init__(
        self,
        size: int = 1,
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
        exchange_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.size = whole("tensor parallel size", size)
        self.rank = whole("tensor parallel rank", rank, 0, self.size - 1)
        self.group, self.exchange_group = group, exchange_group

    @classmethod
    def over_world(cls, model: ModelDescription) -> TensorParallel:
        """All ranks of the initialised world as one tensor-parallel group.

        Raises:
            ValueError: for a world size this model cannot be cut into.
        """
        size, rank = dist.get_world_size(), dist.get_rank()
        check_tensor_parallel(model, size)
        if model.attention == "gqa":
            return cls(size, rank, dist.group.WORLD)
        span = max(1, size // model.num_branches)
        # Every rank creates every group, as torch.distributed asks.
        groups = [dist.new_group(list(range(first, size, span))) for first in range(span)]
        return cls(size, rank, dist.group.WORLD, groups[rank % span])

    @classmethod
    def share(cls, size: int, rank: int = 0) -> TensorParallel:
        """One rank's work without its collectives: shapes are right, results are not.

        For measuring a rank's share on one GPU.
        """
        return cls(size, rank)

    def all_reduce(self, x: Tensor) -> Tensor:
        """x summed over all ranks, in place."""
        if self.group is not None and self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather_queries(self, q: Tensor, parts: int) -> Tensor:
        """Own heads `[T, h_c / parts, e]` -> the core's `[T, h_c, e]`."""
        if parts == 1:
            return q
        t, own, e = q.shape
        out = q.new_empty(parts * t, own, e)
        if self.exchange_group is None:
            out.view(parts, t, own, e)[:] = q
        else:
            dist.all_gather_into_tensor(out, q.contiguous(), group=self.exchange_group)
        return out.view(parts, t, own, e).transpose(0, 1).reshape(t, parts * own, e)

    def reduce_outputs(self, out: Tensor, parts: int) -> Tensor:
        """Partial branch sums `[T, h_c, v]` -> own heads, whole: `[T, h_c / parts, v]`."""
        if parts == 1:
            return out
        t, heads, v = out.shape
        by_owner = out.view(t, parts, heads // parts, v).transpose(0, 1).contiguous()
        if self.exchange_group is None:
            return by_owner[0]
        own = torch.empty_like(by_owner[0])
        dist.reduce_scatter_tensor(own, by_owner.flatten(0, 1), group=self.exchange_group)
        return own

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        """`[T, rows]` of every rank, side by side: `[T, tp * rows]`."""
        if self.size == 1 or self.group is None:
            return logits
        t, rows = logits.shape
        out = logits.new_empty(self.size * t, rows)
        dist.all_gather_into_tensor(out, logits.contiguous(), group=self.group)
        return out.view(self.size, t, rows).transpose(0, 1).reshape(t, self.size * rows)
