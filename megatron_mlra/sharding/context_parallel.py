"""The attention's context-parallel collective: latents and the RoPE key of the whole sequence.

A rank keeps the queries of its own tokens, and gathers latents and RoPE keys from all ranks, at
most d_c + d_r numbers per token. In absorbed form these are the keys and values; the materialized
form expands them for the whole sequence. Every rank uses the whole sequence, so that the gradient
is a sum over ranks: the all-gather's backward is a reduce-scatter.

Letters: T tokens of the sequence, s = T / cp tokens of the rank, b batch, n branches and g head
groups of the rank, l latent dim.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mlra.sharding.token_plan import TokenPlan


class ContextParallel:
    """The gathers over one context-parallel group; with one rank nothing is sent."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def start_gather(self, latents: Tensor, k_rope: Tensor) -> PendingGather:
        """Start the gather of this rank's latents `[s, b, n, g, l]` and RoPE key `[s, b, d_r]`."""
        return PendingGather(latents, k_rope, self.group)


class PendingGather:
    """A gather that has started. Computation before `finish` overlaps with it, in backward too."""

    def __init__(self, latents: Tensor, k_rope: Tensor, group: dist.ProcessGroup) -> None:
        self.parts = (latents, k_rope)
        self.exchange = None
        if group.size() > 1:
            self.exchange = _Exchange(group)
            joined = torch.cat((latents.flatten(2), k_rope), dim=-1)
            self.pending = _Start.apply(joined, self.exchange)

    def finish(self, plan: TokenPlan) -> tuple[Tensor, Tensor]:
        """Latents `[T, b, n, g, l]` and RoPE key `[T, b, d_r]` in the order of the sequence."""
        latents, k_rope = self.parts
        if self.exchange is None:
            return latents, k_rope
        whole = _Finish.apply(self.pending, self.exchange)
        whole_latents, whole_k_rope = (
            plan.in_sequence_order(part)
            for part in whole.split((whole.size(-1) - k_rope.size(-1), k_rope.size(-1)), dim=-1)
        )
        return whole_latents.view(-1, *latents.shape[1:]), whole_k_rope


class _Exchange:
    """State of `_Start` and `_Finish`: the current collective and its output."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.work: dist.Work | None = None
        self.whole: Tensor | None = None

    def all_gather(self, x: Tensor) -> None:
        self.whole = x.new_empty(x.size(0) * self.group.size(), *x.shape[1:])
        self.work = dist.all_gather_into_tensor(
            self.whole, x.contiguous(), group=self.group, async_op=True
        )

    def reduce_scatter(self, x: Tensor) -> Tensor:
        out = x.new_empty(x.size(0) // self.group.size(), *x.shape[1:])
        self.work = dist.reduce_scatter_tensor(out, x.contiguous(), group=self.group, async_op=True)
        return out

    def wait(self) -> None:
        self.work.wait()
        self.work = None


class _Start(torch.autograd.Function):
    """Starts the all-gather; in backward, waits for the reduce-scatter that `_Finish` started.

    Backward runs `_Finish` first, then the operations that forward ran in between, then `_Start`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.all_gather(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.wait()
        return grad, None


class _Finish(torch.autograd.Function):
    """Waits for the all-gather; in backward, starts the reduce-scatter."""

    @staticmethod
    def forward(ctx, pending: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        whole, exchange.whole = exchange.whole, None
        return whole

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.reduce_scatter(grad), None
