"""How a step sums over ranks: one rule, and the sum with the residual add and norm behind it.

A layer sums twice, behind its attention and behind its MLP, `[T, d]` each. In decoding these
messages are small, and a collective of NCCL is bound by its latency. The one-shot sum
(`mlra_kernels.one_shot`) writes them straight into the peers' memory and is one launch with the
norm. Its traffic grows with ranks, so large messages stay with NCCL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mlra.description.backends import ALL_REDUCES
from megatron_mlra.inference.backends.base import Ops
from megatron_mlra.inference.parallel import TensorParallel

SENT_BYTES = 3 << 19
"""Most bytes that a rank sends in a one-shot sum, twice its message (each word carries a stamp) to
each peer: 128 tokens of the 2.9B model on two ranks. There one-shot still takes 0.57 of the time of
NCCL and the norm (two H200, kernels/mlra_kernels/one_shot/README.md); more ranks were not
measured."""


@dataclass(frozen=True)
class Reduction:
    """The choice of a model on one rank, the same on all."""

    path: str = "none: no other rank"
    """What sums, and why, for people."""
    peers: Any = None
    """`mlra_kernels.one_shot.Peers`, or None: every sum is a collective."""

    def add_rms_norm(
        self,
        ops: Ops,
        parallel: TensorParallel,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """The sum over ranks of x plus the residual, `[T, d]`, and the norm of that; may overwrite
        x."""
        if self.peers is not None and x.size(0) <= self.peers.rows:
            from mlra_kernels.one_shot import all_reduce_add_rms_norm

            return all_reduce_add_rms_norm(x, residual, weight, eps, self.peers)
        return ops.add_rms_norm(parallel.all_reduce(x), residual, weight, eps)


def choose_reduction(
    name: str,
    parallel: TensorParallel,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
) -> Reduction:
    """The rule. A collective of all ranks of `parallel`, which call it alike.

    Raises:
        ValueError: an unknown name, or 'one-shot' where it cannot run.
    """
    if name not in ALL_REDUCES:
        raise ValueError(f"all-reduce is {name!r}; use one of {', '.join(ALL_REDUCES)}")
    if parallel.group is None or parallel.world == 1:
        return Reduction()
    collective = dist.get_backend(parallel.group)
    if name == "nccl":
        return Reduction(f"{collective}: asked for")
    rows = one_shot_rows(parallel.world, hidden_size, dtype)
    found = _misfit(parallel, device, ops, rows)
    if found is None:
        found = _joined(parallel, rows, hidden_size, dtype, device)
    if not isinstance(found, str):
        return Reduction(f"one-shot to {rows} tokens, {collective} beyond", found)
    if name == "one-shot":
        raise ValueError(f"all-reduce one-shot cannot run: {found}; use auto or nccl")
    return Reduction(f"{collective}: {found}")


def one_shot_rows(world: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Most tokens of a one-shot sum over `world` ranks; may be 0."""
    from mlra_kernels.one_shot.peers import MAX_ROWS

    return min(MAX_ROWS, SENT_BYTES // (2 * (world - 1) * hidden_size * dtype.itemsize))


def _misfit(parallel: TensorParallel, device: torch.device, ops: Ops, rows: int) -> str | None:
    """Why one-shot cannot run, as far as each rank knows it alone."""
    from mlra_kernels.one_shot.peers import MAX_RANKS

    if device.type != "cuda":
        return f"one-shot needs GPUs, this is {device.type}"
    if ops.name != "mlra_kernels":
        return f"one-shot needs backend mlra_kernels, this is {ops.name}"
    if parallel.world > MAX_RANKS:
        return f"one-shot takes {MAX_RANKS} ranks, these are {parallel.world}"
    return None if rows else "a token's message is too large for one-shot"


def _joined(
    parallel: TensorParallel, rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> object:
    """The ranks' memory, mapped once per world and size; or why that failed."""
    from mlra_kernels.one_shot import NoPeers, join_peers

    key = rows, hidden_size, dtype, device
    if key not in parallel.peers:
        try:
            parallel.peers[key] = join_peers(parallel.group, rows, hidden_size, dtype, device)
        except NoPeers as error:
            parallel.peers[key] = str(error)
    return parallel.peers[key]
