"""The attention's tensor-parallel collectives. partition.py tells which rank owns what.

After the gathers below all ranks hold the same latents and RoPE key, but use them for different
(branch, head) pairs. The gradient of a gathered tensor is therefore a sum over ranks: each gather's
backward is a reduce-scatter.

Letters: s tokens, b batch, d hidden size, h heads, n branches and g head groups of the rank, e
query dim d_h + d_r, v value dim.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    all_to_all,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_scatter_last_dim_to_tensor_parallel_region,
)
from torch import Tensor

from megatron_mlra.description.latent import LatentSizes
from megatron_mlra.sharding.partition import LatentShard


class _GatherColumns(torch.autograd.Function):
    """Tensors `[..., w_i]` and vectors `[w_i]`, cut over ranks by columns, made whole by one
    all-gather; in backward one reduce-scatter.

    The vectors are one more row of the tensors' tokens. What is sent has the ranks as its first
    axis, as a gather leaves it, so that each tensor is copied once.
    """

    @staticmethod
    def forward(ctx, group: dist.ProcessGroup, num_tensors: int, *parts: Tensor | None):
        tensors, vectors = parts[:num_tensors], parts[num_tensors:]
        first, tp = tensors[0], group.size()
        ctx.group, ctx.lead, ctx.rows = group, first.shape[:-1], first.shape[:-1].numel()
        ctx.widths = [tensor.size(-1) for tensor in tensors]
        ctx.dtypes = [None if vector is None else vector.dtype for vector in vectors]
        carries = any(dtype is not None for dtype in ctx.dtypes)
        ctx.shape = (ctx.rows + carries, sum(ctx.widths))
        mine = first.new_empty(ctx.shape)
        torch.cat([x.reshape(ctx.rows, -1) for x in tensors], dim=1, out=mine[: ctx.rows])
        if carries:
            for place, vector in zip(mine[-1].split(ctx.widths), vectors, strict=True):
                place.zero_() if vector is None else place.copy_(vector)
        everyone = first.new_empty((tp, *ctx.shape))
        dist.all_gather_into_tensor(everyone.flatten(0, 1), mine, group=group)
        places = everyone.split(ctx.widths, dim=-1)
        whole = [place[:, : ctx.rows].transpose(0, 1).reshape(*ctx.lead, -1) for place in places]
        for place, dtype in zip(places, ctx.dtypes, strict=True):
            whole.append(None if dtype is None else place[:, -1].to(dtype).reshape(-1))
        return tuple(whole)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        tp, n = ctx.group.size(), len(ctx.widths)
        everyone = grads[0].new_empty((tp, *ctx.shape))
        places = everyone.split(ctx.widths, dim=-1)
        for place, width, grad in zip(places, ctx.widths, grads[:n], strict=True):
            place[:, : ctx.rows].copy_(grad.reshape(ctx.rows, tp, width).transpose(0, 1))
        if ctx.shape[0] > ctx.rows:
            for place, width, grad in zip(places, ctx.widths, grads[n:], strict=True):
                row = place[:, -1]
                row.zero_() if grad is None else row.copy_(grad.view(tp, width))
        mine = everyone.new_empty(ctx.shape)
        dist.reduce_scatter_tensor(mine, everyone.flatten(0, 1), group=ctx.group)
        own = mine.split(ctx.widths, dim=-1)
        tensors = [place[: ctx.rows].view(*ctx.lead, -1) for place in own]
        vectors = [
            None if dtype is None else place[-1].to(dtype)
            for place, dtype in zip(own, ctx.dtypes, strict=True)
        ]
        return None, None, *tensors, *vectors


def gather_columns(
    group: dist.ProcessGroup, parts: dict[str, Tensor], weights: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One all-gather of tensors that are cut by columns, and of weights that go with the columns.

    Args:
        parts: name -> `[..., w / tp]`, alike in all axes but the last.
        weights: name of a part -> a weight for each of its columns, `[w / tp]`.

    Returns:
        Both, whole: `[..., w]` and `[w]`.
    """
    if group.size() == 1:
        return parts, weights
    whole = _GatherColumns.apply(
        group, len(parts), *parts.values(), *(weights.get(name) for name in parts)
    )
    tensors, vectors = whole[: len(parts)], zip(parts, whole[len(parts) :], strict=True)
    return dict(zip(parts, tensors, strict=True)), {n: v for n, v in vectors if v is not None}


class LatentParallel:
    """The attention's tensor-parallel collectives for one LatentShard."""

    def __init__(
        self,
        config: LatentSizes,
        shard: LatentShard,
        group: dist.ProcessGroup,
        sequence_parallel: bool,
    ) -> None:
        self.config = config
        self.shard = shard
        self.group = group
        self.sequence_parallel = sequence_parallel and shard.tp_size > 1
        self.exchanges = config.latent_tp_layout == "latent" and shard.tp_size > 1

    def enter(self, x: Tensor) -> Tensor:
        """The input of all column-parallel projections, gathered once.

        With sequence parallel `[s / tp, b, d]` -> `[s, b, d]` (backward: reduce-scatter), else the
        identity (backward: all-reduce).
        """
        if self.shard.tp_size == 1:
            return x
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(x, group=self.group)
        return copy_to_tensor_model_parallel_region(x, group=self.group)

    def gather_compressed(
        self, parts: dict[str, Tensor], weights: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`gather_columns` of all compressed tensors.

        Args:
            parts: `c_q` `[s, b, d_q / tp]` if there is one; `c` `[s, b, d_c / tp]`, not gathered if
                the rank owns its latents; `k_rope` `[s, b, d_r / tp]`.
            weights: name of a gathered part -> a weight for each of its columns.
        """
        sent = {n: x for n, x in parts.items() if n != "c" or not self.shard.owns_latents}
        whole, weights = gather_columns(self.group, sent, weights)
        return parts | whole, weights

    def own_latents(self, c: Tensor) -> Tensor:
        """`gather_compressed`'s `c` -> the latents that this rank reads, `[s, b, n, g, d_l]`."""
        shard, lead, l = self.shard, c.shape[:-1], self.config.latent_dim
        if shard.owns_latents:
            return c.view(*lead, shard.branches, shard.groups, l)
        c = c.view(*lead, self.config.num_branches, self.config.num_head_groups, l)
        c = c.narrow(-3, shard.branch_start, shard.branches)
        return c.narrow(-2, shard.group_start, shard.groups)

    def exchange_queries(self, q: Tensor) -> Tensor:
        """Queries of own heads `[s, b, h / tp, e]` -> of the core's heads `[s, b, shard.heads, e]`.

        An all-gather if tp divides N, else an all-to-all; the identity in the head layout.
        """
        if not self.exchanges:
            return q
        s, b, own, e = q.shape
        if self.config.num_branches % self.shard.tp_size == 0:
            q = all_gather_last_dim_from_tensor_parallel_region(q.flatten(2), group=self.group)
            return q.view(s, b, self.shard.heads, e)
        n = self.config.num_branches
        readers, owners = self._reader_and_owner_splits(s)
        q = all_to_all(self.group, q.repeat(n, 1, 1, 1), owners, readers)
        return q.view(n, s, b, own, e).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def reduce_branches(self, out: Tensor) -> Tensor:
        """Partial branch sums of the core's heads `[s, b, shard.heads, v]` -> complete sums of own
        heads `[s, b, h / tp, v]`. The reverse of `exchange_queries`."""
        if not self.exchanges:
            return out
        s, b, _, v = out.shape
        own = self.config.num_attention_heads // self.shard.tp_size
        if self.config.num_branches % self.shard.tp_size == 0:
            out = reduce_scatter_last_dim_to_tensor_parallel_region(
                out.flatten(2), group=self.group
            )
            return out.view(s, b, own, v)
        n = self.config.num_branches
        readers, owners = self._reader_and_owner_splits(s)
        out = out.view(s, b, n, own, v).permute(2, 0, 1, 3, 4).flatten(0, 1)
        out = all_to_all(self.group, out, readers, owners)
        return out.view(n, s, b, own, v).sum(0)

    def _reader_and_owner_splits(self, s: int) -> tuple[list[int], list[int]]:
        """Tokens sent to each rank (which reads this rank's heads), and received from each rank
        (which owns heads that this rank reads).

        With tp > N a branch spans tp / N ranks. Rank r works on branch `r // (tp / N)`, and on the
        heads of the N ranks from `N * (r mod tp / N)` on.
        """
        tp, rank, n = self.shard.tp_size, self.shard.tp_rank, self.config.num_branches
        span = tp // n
        readers = [s if r % span == rank // n else 0 for r in range(tp)]
        owners = [s if r // n == rank % span else 0 for r in range(tp)]
        return readers, owners
