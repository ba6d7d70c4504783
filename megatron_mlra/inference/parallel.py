"""Decoding on several ranks: what a rank owns, and the collectives of a step.

Tensor parallel is the `latent` layout of sharding/partition.py: a rank caches its own latent heads
and attends with all query heads of these latents. Where ranks outnumber latent heads, the ranks of
one latent head split its query heads. Ranks with the same heads in different branches form an
**exchange group** (min(N, tp) ranks).

Context parallel also cuts the tokens of each sequence (context.py): the ranks of a **context
group** attend with the same heads to different tokens, and each rank gets the merged output of its
1 / cp of those heads. Everything outside the attention's core is cut over all ranks, the **world**,
in which a rank is number `context_rank * tp + tensor_rank`.

Letters: h query heads, N branches, L latent heads, h_c heads of this rank's core, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mlra.description.backends import WEIGHT_MODES
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.inference.checks import whole
from megatron_mlra.sharding.partition import LatentShard


@dataclass(frozen=True)
class HeadShard:
    """One rank's heads: those of its core, and those whose projections the rank holds."""

    core: LatentShard
    query_heads: int
    """Heads whose query projection this rank holds."""
    query_start: int
    merged_heads: int
    """Heads of the core whose outputs over all tokens this rank gets."""
    merged_start: int
    """The first of those heads, counted from the core's first."""
    own_heads: int
    """Heads whose gate and output projection this rank holds."""
    own_start: int
    exchange: tuple[int, ...]
    """Tensor-parallel ranks that hold the other parts of this core's heads, in head order."""

    @property
    def merged(self) -> slice:
        """The core's heads whose outputs this rank gets."""
        return slice(self.merged_start, self.merged_start + self.merged_heads)

    @property
    def merged_groups(self) -> slice:
        """The core's head groups that the `merged` heads lie in."""
        each = self.core.heads // self.core.groups
        return slice(self.merged_start // each, -(-self.merged.stop // each))

    @classmethod
    def plan(
        cls,
        model: ModelDescription,
        tp: int,
        rank: int,
        weight_mode: str,
        context: int = 1,
        context_rank: int = 0,
    ) -> HeadShard:
        """The share of tensor-parallel rank `rank`, context-parallel rank `context_rank`.

        Raises:
            ValueError: the weight mode is unknown or does not fit, or the model cannot be cut into
                this size; the message names what works.
        """
        if weight_mode not in WEIGHT_MODES:
            raise ValueError(f"weight mode is {weight_mode!r}; use one of {WEIGHT_MODES}")
        check_parallel(model, tp, context)
        core = LatentShard.plan(model, tp, rank, "latent")
        span = max(1, tp // model.num_branches)
        exchange = tuple(range(rank % span, tp, span))
        merged = core.heads // context
        start = context_rank * merged
        if weight_mode == "replicated":
            query, own, own_start = (core.heads, core.head_start), merged, core.head_start + start
        else:
            if merged % len(exchange):
                raise ValueError(
                    f"weight mode sharded gives each of {len(exchange)} ranks a part of {merged}"
                    " heads; use replicated"
                )
            own = merged // len(exchange)
            own_start = core.head_start + start + exchange.index(rank) * own
            query = own, own_start
        return cls(core, *query, merged, start, own, own_start, exchange)


def check_tensor_parallel(model: ModelDescription, tp: int) -> None:
    """Raise ValueError, with the sizes that work, unless `model` can be cut over `tp` ranks."""
    tp = whole("tensor parallel size", tp)
    if not _fits(model, tp):
        works = [n for n in range(1, 129) if _fits(model, n)]
        raise ValueError(
            f"tensor parallel size {tp} does not fit {_heads_of(model)}; use one"
            f" of {', '.join(map(str, works))}"
        )


def check_parallel(model: ModelDescription, tp: int, context: int) -> None:
    """Raise ValueError, with the sizes that work, unless `model` can be cut over `tp` ranks and
    the tokens over `context` such groups of ranks."""
    check_tensor_parallel(model, tp)
    context = whole("context parallel size", context)
    if not _fits_context(model, tp, context):
        works = [n for n in range(1, 129) if _fits_context(model, tp, n)]
        raise ValueError(
            f"context parallel size {context} does not fit {_heads_of(model)} at tensor parallel"
            f" size {tp}; use one of {', '.join(map(str, works))}"
        )


def _heads_of(model: ModelDescription) -> str:
    h = model.num_attention_heads
    kind = (
        f"num_query_groups {model.num_query_groups}"
        if model.attention == "gqa"
        else f"num_latent_heads {model.num_latent_heads}, num_branches {model.num_branches}"
    )
    return f"{model.variant} ({h} heads, {kind})"


def _fits(model: ModelDescription, tp: int) -> bool:
    counts = (
        (model.num_query_groups,)
        if model.attention == "gqa"
        else (model.num_latent_heads, model.num_branches)
    )
    return model.num_attention_heads % tp == 0 and all(n % tp == 0 or tp % n == 0 for n in counts)


def _fits_context(model: ModelDescription, tp: int, context: int) -> bool:
    """Whether the heads of a rank's core can be cut into `context` equal runs, each of whole head
    groups or within one head group."""
    if model.attention == "gqa":
        heads, groups = model.num_attention_heads // tp, max(1, model.num_query_groups // tp)
    else:
        core = LatentShard.plan(model, tp, 0, "latent")
        heads, groups = core.heads, core.groups
    return heads % context == 0 and (groups % context == 0 or context % groups == 0)


class TensorParallel:
    """The collectives of one rank.

    Args:
        size, rank: size of the tensor-parallel group, and this rank's place in it.
        group: process group of all ranks; None for a single rank, or for `share`.
        exchange_group: the ranks of `HeadShard.exchange` with this rank's tokens.
        context, context_rank: size of the context-parallel group, and this rank's place in it.
        context_group: the ranks with this rank's heads, by context rank.
        query_group: the ranks that hold parts of this core's queries, in head order.

    Raises:
        ValueError: a size that is not a whole number of at least 1, or a rank that is not below
            its size.
    """

    def __init__(
        self,
        size: int = 1,
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
        exchange_group: dist.ProcessGroup | None = None,
        context: int = 1,
        context_rank: int = 0,
        context_group: dist.ProcessGroup | None = None,
        query_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.size = whole("tensor parallel size", size)
        self.rank = whole("tensor parallel rank", rank, 0, self.size - 1)
        self.context = whole("context parallel size", context)
        self.context_rank = whole("context parallel rank", context_rank, 0, self.context - 1)
        self.group, self.exchange_group = group, exchange_group
        self.context_group, self.query_group = context_group, query_group
        self.peers: dict[tuple, object] = {}
        """Memory of the ranks that is mapped into each other, by size (reduction.py)."""

    @property
    def world(self) -> int:
        """Number of ranks in the world."""
        return self.size * self.context

    @property
    def world_rank(self) -> int:
        """This rank's number in the world."""
        return self.context_rank * self.size + self.rank

    @classmethod
    def over_world(cls, model: ModelDescription, context: int = 1) -> TensorParallel:
        """All ranks of torch's initialised world, as `context` tensor-parallel groups.

        Raises:
            ValueError: the model cannot be cut over a world of this size.
        """
        world, rank = dist.get_world_size(), dist.get_rank()
        tp = tensor_parallel_size(world, context)
        check_parallel(model, tp, context)
        turn, tensor_rank = divmod(rank, tp)
        span = tp if model.attention == "gqa" else max(1, tp // model.num_branches)

        # Every rank creates every group, as torch.distributed asks.
        def group(ranks: list[int]) -> dist.ProcessGroup | None:
            return dist.new_group(ranks) if len(ranks) > 1 else None

        contexts = [group(list(range(t, world, tp))) for t in range(tp)]
        queries = [
            group([c * tp + e for c in range(context) for e in range(first, tp, span)])
            for first in range(span)
        ]
        exchanges = queries
        if context > 1:
            exchanges = [
                group([c * tp + e for e in range(first, tp, span)])
                for c in range(context)
                for first in range(span)
            ]
        return cls(
            tp,
            tensor_rank,
            dist.group.WORLD,
            exchanges[turn * span + tensor_rank % span],
            context,
            turn,
            contexts[tensor_rank],
            queries[tensor_rank % span],
        )

    @classmethod
    def share(cls, size: int, rank: int = 0, context: int = 1) -> TensorParallel:
        """One rank's work without collectives: shapes are right, results are not.

        Benchmarks measure a rank's share on one GPU with this.
        """
        return cls(size, rank, context=context)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x over all ranks, in place; returns x."""
        if self.group is not None and self.world > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather_queries(self, q: Tensor, parts: int) -> Tensor:
        """This rank's heads `[T, h_c / parts, e]` -> the core's `[T, h_c, e]`."""
        if parts == 1:
            return q
        t, own, e = q.shape
        out = q.new_empty(parts * t, own, e)
        if self.query_group is None:
            out.view(parts, t, own, e)[:] = q
        else:
            dist.all_gather_into_tensor(out, q.contiguous(), group=self.query_group)
        return out.view(parts, t, own, e).transpose(0, 1).reshape(t, parts * own, e)

    def exchange_tokens(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of all core heads to this rank's tokens -> attention of this rank's 1 / cp of
        the heads to each rank's tokens.

        Args:
            out: `[T, ..., h_c, w]`.
            lse: `[T, ..., h_c]` float32.

        Returns:
            `[cp, T, ..., h_c / cp, w]` and `[cp, T, ..., h_c / cp]`, one entry per rank, to merge.
        """
        # One collective for both: a float32 travels as numbers of out's dtype, bit for bit.
        packed = torch.cat((out, lse.unsqueeze(-1).view(out.dtype)), dim=-1)
        packed = packed.unflatten(-2, (self.context, -1)).movedim(-3, 0).contiguous()
        arrived = torch.empty_like(packed)
        if self.context_group is None:
            arrived[:] = packed[self.context_rank]
        else:
            dist.all_to_all_single(arrived, packed, group=self.context_group)
        width = out.size(-1)
        return arrived[..., :width], arrived[..., width:].contiguous().view(lse.dtype)[..., 0]

    def reduce_outputs(self, out: Tensor, parts: int) -> Tensor:
        """Partial branch sums `[T, h, v]` -> complete sums of own heads `[T, h / parts, v]`."""
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
        """`[T, rows]` of this rank -> all ranks' logits side by side `[T, world * rows]`."""
        if self.world == 1 or self.group is None:
            return logits
        t, rows = logits.shape
        out = logits.new_empty(self.world * t, rows)
        dist.all_gather_into_tensor(out, logits.contiguous(), group=self.group)
        return out.view(self.world, t, rows).transpose(0, 1).reshape(t, self.world * rows)


def tensor_parallel_size(world: int, context: int) -> int:
    """Ranks per tensor-parallel group where `context` groups make up the world.

    Raises:
        ValueError: `context` does not divide `world`.
    """
    context = whole("context parallel size", context)
    if world % context:
        works = [n for n in range(1, world + 1) if world % n == 0]
        raise ValueError(
            f"context parallel size {context} does not divide the number of processes, {world};"
            f" use one of {', '.join(map(str, works))}, or start others with torchrun"
        )
    return world // context
