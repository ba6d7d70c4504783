"""The sum over ranks with residual add and RMSNorm: one launch, by memory that peers write.

Letters: T tokens, d hidden size.
"""

import torch
import triton
from torch import Tensor

from mlra_kernels import checks
from mlra_kernels.one_shot.kernel import one_shot_kernel
from mlra_kernels.one_shot.peers import Peers

PDL = False
"""Launch by programmatic dependent launch: a program may start before the kernel before it ends."""


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, peers: Peers
) -> tuple[Tensor, Tensor]:
    """The sum of all ranks' x, plus residual, and the RMSNorm of that, with statistics in fp32.

    x is summed in float32 in the order of ranks. So all ranks get the same bits. The sum is
    rounded to x's dtype before and after the residual is added, as an all-reduce followed by
    `mlra_kernels.decoder.add_rms_norm` rounds.

    All ranks of `peers` call this equally often, with equal T, in the same order. Calls of one rank
    follow one another on the device. A CUDA graph may capture any of the calls. A rank whose peer
    does not call waits for minutes (`Peers.patience`); then its kernel traps, and torch raises an
    AcceleratorError at the next synchronisation.

    Args:
        x: `[T, d]` with contiguous rows, this rank's summand; T from 0 to `peers.rows`, d and the
            dtype those of `peers`.
        residual: `[T, d]` contiguous, in x's dtype, the same on all ranks.
        weight: `[d]` contiguous, in any float dtype.
        peers: from `join_peers`.

    Returns:
        (sum, norm), both `[T, d]` in x's dtype.

    Raises:
        ValueError: an argument does not fit; the message names the value and the fix.
    """
    if not isinstance(peers, Peers):
        raise ValueError(f"peers is of type {type(peers).__name__}: give what join_peers returned")
    checks.check_tensors(x=x, residual=residual, weight=weight)
    checks.check_device("x", x)
    checks.check_dims("x", x, "[T, d]")
    checks.check_number("eps", eps)
    _check(x, residual, weight, peers)
    return launch(x, residual, weight, eps, peers)


def _check(x: Tensor, residual: Tensor, weight: Tensor, peers: Peers) -> None:
    tokens, d = x.shape
    if x.device != peers.device or x.dtype != peers.dtype:
        raise ValueError(
            f"x is {x.dtype} on {x.device}, peers {peers.dtype} on {peers.device}: give both alike"
        )
    if tokens > peers.rows or d != peers.d or x.stride(1) != 1:
        raise ValueError(
            f"x is {tuple(x.shape)} with strides {x.stride()}: give at most {peers.rows} contiguous"
            f" rows of {peers.d} numbers, as the peers have room for"
        )
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype}, x {tuple(x.shape)} {x.dtype}:"
            " give both alike"
        )
    checks.check_dtype("weight", weight, checks.FLOAT_DTYPES)
    if weight.shape != (d,):
        raise ValueError(f"weight is {tuple(weight.shape)}: give [{d}], one number a column of x")
    checks.check_contiguous(residual=residual, weight=weight)


def launch(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    peers: Peers,
    warps: int | None = None,
    pdl: bool = PDL,
    patience: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`all_reduce_add_rms_norm` without checks.

    Args:
        warps: per program; None: enough for two words a thread.
        patience: looks for a peer's words before the kernel traps; None: `peers.patience`. If
            negative: as many looks, and wrong results instead of a trap.
    """
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if not len(x):
        return total, out
    d, half = peers.d, -(-peers.d // 2)
    block = triton.next_power_of_2(half)
    options = {"num_warps": warps or max(1, min(32, block // 64))}
    if pdl:
        options["launch_pdl"] = True
    with torch.cuda.device_of(x):
        one_shot_kernel[(len(x),)](
            x, residual, weight, total, out, peers.addresses, peers.calls, x.stride(0), eps,
            peers.rows, peers.patience if patience is None else patience,
            d=d, H=half, WORDS=peers.words, BLOCK=block, RANK=peers.rank, W=peers.world, PDL=pdl,
            **options,
        )  # fmt: skip
    return total, out
