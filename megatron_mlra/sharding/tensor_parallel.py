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


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks. Each rank uses the sum for itself, so that the gradient is a sum too."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x summed over `group`; in backward the gradient is summed too."""
    return x if group.size() == 1 else _AllReduceSum.apply(x, group)


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
        self, c_q: Tensor | None, c: Tensor, k_rope: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """One all-gather of all compressed tensors.

        Args:
            c_q: `[s, b, d_q / tp]` or None.
            c: `[s, b, d_c / tp]`; not gathered if the rank owns its latents.
            k_rope: `[s, b, d_r / tp]`.

        Returns:
            c_q `[s, b, d_q]` or None, the latents that this rank reads `[s, b, n, g, d_l]`, k_rope
            `[s, b, d_r]`.
        """
        shard, l = self.shard, self.config.latent_dim
        shape = c.shape[:-1]
        parts = {"c_q": c_q, "k_rope": k_rope}
        if not shard.owns_latents:
            parts["c"] = c
        parts = self._gather({name: part for name, part in parts.items() if part is not None})
        if shard.owns_latents:
            latents = c.view(*shape, shard.branches, shard.groups, l)
        else:
            latents = parts["c"].view(
                *shape, self.config.num_branches, self.config.num_head_groups, l
            )
            latents = latents.narrow(-3, shard.branch_start, shard.branches)
            latents = latents.narrow(-2, shard.group_start, shard.groups)
        return parts.get("c_q"), latents, parts["k_rope"]

    def _gather(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        tp = self.shard.tp_size
        if tp == 1:
            return parts
        widths = [part.size(-1) for part in parts.values()]
        joined = torch.cat(tuple(parts.values()), dim=-1)
        joined = all_gather_last_dim_from_tensor_parallel_region(joined, group=self.group)
        by_rank = joined.view(*joined.shape[:-1], tp, sum(widths)).split(widths, dim=-1)
        return {name: part.flatten(-2) for name, part in zip(parts, by_rank, strict=True)}

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
