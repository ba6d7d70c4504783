"""The absorbed core as one differentiable operation on Hopper GPUs."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mlra_kernels import checks
from mlra_kernels.latent_attention.backward_kernel import latent_attention_backward, row_products
from mlra_kernels.latent_attention.forward_kernel import latent_attention_forward
from mlra_kernels.latent_attention.spans import QUERIES

LATENT_DIMS, ROPE_DIMS = (32, 64, 128), (16, 32, 64)
"""Dims that the kernels take."""

TRITON = "3.6"
"""The supported Triton version: Gluon changes from one version to the next."""

FORWARD_KEYS, BACKWARD_KEYS = 128, 64
"""Keys per tile, in each pass."""

STAGES = 3
"""Tiles of keys that the forward kernel holds in shared memory."""

FORWARD_LAUNCH = {"num_warps": 4, "maxnreg": 168}
BACKWARD_LAUNCH = {"num_warps": 4, "maxnreg": 128}
"""Warps of the first partition, and registers per thread before the partitions share them out: a
multiprocessor's 65,536 registers over 12 warps (forward) and 16 warps (backward)."""

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def latent_attention(
    query: Tensor,
    key: Tensor,
    latent_dim: int,
    scale: float,
    ranges: Tensor | None = None,
    *,
    tiles: Tensor | None = None,
) -> Tensor:
    """Causal attention whose values are the first `latent_dim` columns of its keys.

    Query i reads the keys up to i + t - s (the queries are the last s tokens of the sequence), or
    the keys that `ranges` or `tiles` give.

    Args:
        query: `[s, b, P, latent_dim + rope]`, P a multiple of G; bfloat16 or float16.
        key: `[t, b, G, latent_dim + rope]` in query's dtype, t >= s; query head p reads key head
            p // (P / G).
        latent_dim: 32, 64 or 128; the rope dims are 16, 32 or 64.
        scale: factor of the scores before the softmax.
        ranges: first and last key of each query, int32 `[2, s]` on the same device, from
            `key_ranges`. Neither row may fall from one query to the next, and first <= last < t.
            The kernels do not check this: other numbers give wrong results, but no read past the
            keys and no deadlock.
        tiles: in place of ranges, the queries and keys of each program: int32 `[n, 4]` on the same
            device, from `query_tiles`. `reads_of` chooses between ranges and tiles.

    Returns:
        `[s, b, P, latent_dim]` in query's dtype. The gradient of `key` includes the gradient of the
        values. It is summed by atomic additions, so its last bits differ from run to run.

    Raises:
        ValueError: see check_supported; or ranges or tiles do not fit; or the tensors are not on a
            Hopper GPU.
    """
    return _apply(query, key, latent_dim, scale, ranges, tiles, top=False)


def latent_attention_with_top(
    query: Tensor,
    key: Tensor,
    latent_dim: int,
    scale: float,
    ranges: Tensor | None = None,
    *,
    tiles: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`latent_attention`, and the largest scaled score of each query head.

    The softmax computes each query's largest score anyway. Keeping the scores costs 4 bytes per
    query and head, written and read once.

    Returns:
        `[s, b, P, latent_dim]` and, without gradient, `[P]` float32: the maximum over sequences,
        queries and the keys that each query reads, exact up to float32 rounding.

    Raises:
        ValueError: see latent_attention.
    """
    return _apply(query, key, latent_dim, scale, ranges, tiles, top=True)


def _apply(query, key, latent_dim, scale, ranges, tiles, top: bool):
    _check(query, key, latent_dim, scale, causal=True)
    ranges, tiles = _reads(query, ranges, tiles, causal=True)
    return _LatentAttention.apply(query, key, latent_dim, scale, ranges, tiles, top)


def latent_attention_with_lse(
    query: Tensor,
    key: Tensor,
    latent_dim: int,
    scale: float,
    *,
    causal: bool = True,
    ranges: Tensor | None = None,
    tiles: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`latent_attention` without gradients, and the natural log-sum-exp of each query's scores.

    Args:
        causal: if False, every query reads all keys, and t may be less than s.
        ranges, tiles: as in latent_attention, only with `causal`.

    Returns:
        `[s, b, P, latent_dim]` in query's dtype and the log-sum-exp `[b, P, s]` float32.

    Raises:
        ValueError: see latent_attention.
    """
    _check(query, key, latent_dim, scale, causal)
    ranges, tiles = _reads(query, ranges, tiles, causal)
    past = len(key) - len(query) if causal else len(key)
    query, key = _whole(query), _whole(key)
    out, lse, _ = _forward(query, key, latent_dim, scale, past, ranges, tiles)
    return out, lse


def misfit(latent_dim: int, rope_dim: int) -> str | None:
    """Why the kernels cannot run these sizes on this machine, and the fix; None if they can."""
    for wrong, said in (
        (
            not _takes_sizes(latent_dim, rope_dim),
            "takes latent heads of 32, 64 or 128 dims and 16, 32 or 64 RoPE dims, not"
            f" {latent_dim} and {rope_dim}; use those",
        ),
        (
            not (torch.cuda.is_available() and _is_hopper()),
            "runs on Hopper GPUs (H100, H200); use one",
        ),
        (
            not triton.__version__.startswith(TRITON + "."),
            f"needs Triton {TRITON} and {triton.__version__} is installed; use that",
        ),
    ):
        if wrong:
            return said
    return None


def check_supported(query: Tensor, key: Tensor, latent_dim: int, *, causal: bool = True) -> None:
    """Refuse tensors that the kernels do not take.

    Raises:
        ValueError: a shape, dtype or dim does not fit; one line that names the value and the fix.
    """
    checks.check_tensors(query=query, key=key)
    checks.check_dims("query", query, "[s, b, P, e]")
    checks.check_dims("key", key, "[t, b, G, e]")
    width, rope = query.size(3), query.size(3) - latent_dim
    for name, x in (("query", query), ("key", key)):
        if x.dtype not in _DTYPES or x.dtype != query.dtype:
            raise ValueError(f"{name} is {x.dtype}; latent_attention takes bfloat16 or float16")
        too_few = causal and len(x) < len(query)
        empty = not x.numel()
        if empty or (x.size(1), x.size(3)) != (query.size(1), width) or too_few:
            raise ValueError(
                f"query is {list(query.shape)} and {name} {list(x.shape)}; they are [s, b, P, e]"
                " and [t, b, G, e] with t >= s, none of them 0"
            )
    if max(query.size(1), query.size(2)) > checks.MAX_GRID:
        raise ValueError(f"query is {list(query.shape)}; b and P are at most {checks.MAX_GRID}")
    if not _takes_sizes(latent_dim, rope):
        raise ValueError(
            f"latent dim {latent_dim} with {rope} RoPE dims; latent_attention takes 32, 64 or 128"
            " with 16, 32 or 64"
        )
    if query.size(2) % key.size(2):
        raise ValueError(f"{query.size(2)} query heads are no multiple of {key.size(2)} key heads")


def _takes_sizes(latent_dim: int, rope_dim: int) -> bool:
    return latent_dim in LATENT_DIMS and rope_dim in ROPE_DIMS


def _is_hopper(device: torch.device | None = None) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def _check(query: Tensor, key: Tensor, latent_dim: int, scale: float, causal: bool) -> None:
    checks.check_integer("latent_dim", latent_dim, 1)
    checks.check_number("scale", scale, positive=True)
    check_supported(query, key, latent_dim, causal=causal)
    if not (query.is_cuda and _is_hopper(query.device)):
        raise ValueError(f"latent_attention runs on Hopper GPUs, not on {query.device}")


def _reads(
    query: Tensor, ranges: Tensor | None, tiles: Tensor | None, causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Ranges and tiles, checked and contiguous."""
    given = {"ranges": ranges is not None, "tiles": tiles is not None, "causal=False": not causal}
    if sum(given.values()) > 1:
        several = " and ".join(name for name, is_given in given.items() if is_given)
        raise ValueError(f"{several} are given: leave all but one out")
    if ranges is not None:
        _check_ranges(ranges, query)
        ranges = ranges.contiguous()
    if tiles is not None:
        _check_tiles(tiles, query)
        tiles = tiles.contiguous()
    return ranges, tiles


def _check_ranges(ranges: Tensor, query: Tensor) -> None:
    checks.check_tensors(query=query, ranges=ranges)
    expected = (torch.int32, (2, len(query)), query.device)
    if (ranges.dtype, tuple(ranges.shape), ranges.device) != expected:
        raise ValueError(
            f"ranges is {ranges.dtype} {list(ranges.shape)} on {ranges.device}; it is torch.int32"
            f" {[2, len(query)]} on {query.device}"
        )


def _check_tiles(tiles: Tensor, query: Tensor) -> None:
    checks.check_tensors(query=query, tiles=tiles)
    shaped = tiles.dim() == 2 and tiles.size(1) == 4 and len(tiles) > 0
    if not shaped or tiles.dtype != torch.int32 or tiles.device != query.device:
        raise ValueError(
            f"tiles is {tiles.dtype} {list(tiles.shape)} on {tiles.device}; it is torch.int32"
            f" [n, 4] on {query.device}, from query_tiles"
        )


def _grid(query: Tensor, tiles: Tensor | None) -> tuple[int, ...]:
    s, b, pairs, _ = query.shape
    return (triton.cdiv(s, QUERIES), pairs, b) if tiles is None else (len(tiles) * pairs, b)


def _forward(
    query: Tensor,
    key: Tensor,
    latent_dim: int,
    scale: float,
    past: int,
    ranges: Tensor | None,
    tiles: Tensor | None,
    top: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    s, b, pairs, width = query.shape
    t, rope, half = key.size(0), width - latent_dim, QUERIES // 2
    out = query.new_empty(s, b, pairs, latent_dim)
    lse = query.new_empty(b, pairs, s, dtype=torch.float32)
    tops = torch.empty_like(lse) if top else None
    with torch.cuda.device_of(query):
        latent_attention_forward[_grid(query, tiles)](
            _rows(query, half, latent_dim), _rows(query, half, rope),
            _rows(key, FORWARD_KEYS, latent_dim), _rows(key, FORWARD_KEYS, rope),
            _rows(out, half, latent_dim), None if tiles is None else out, lse, tops, ranges, tiles,
            s, t, past,
            scale / math.log(2), P=pairs, G=key.size(2), L=latent_dim, R=rope, M=QUERIES,
            N=FORWARD_KEYS, STAGES=STAGES, RANGES=ranges is not None, TILES=tiles is not None,
            **FORWARD_LAUNCH,
        )  # fmt: skip
    return out, lse, tops


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        query,
        key,
        latent_dim: int,
        scale: float,
        ranges: Tensor | None,
        tiles: Tensor | None,
        top: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        query, key = _whole(query), _whole(key)
        past = len(key) - len(query)
        out, lse, tops = _forward(query, key, latent_dim, scale, past, ranges, tiles, top)
        ctx.save_for_backward(query, key, out, lse, ranges, tiles)
        ctx.scale = scale
        if tops is None:
            return out
        largest = tops.amax((0, 2))
        ctx.mark_non_differentiable(largest)
        return out, largest

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        query, key, out, lse, ranges, tiles = ctx.saved_tensors
        grad = _whole(grad)
        s, b, pairs, width = query.shape
        latent_dim = out.size(-1)
        rope = width - latent_dim
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        delta = torch.empty_like(lse)
        with torch.cuda.device_of(query):
            row_products[(triton.cdiv(s, 32), pairs, b)](
                out, grad, delta, s, b, P=pairs, L=latent_dim, T=32, num_warps=4
            )
            half = QUERIES // 2
            latent_attention_backward[_grid(query, tiles)](
                _rows(query, half, latent_dim), _rows(query, half, rope),
                _rows(key, BACKWARD_KEYS, latent_dim), _rows(key, BACKWARD_KEYS, rope),
                _rows(grad, half, latent_dim),
                _rows(grad_query, half, latent_dim), _rows(grad_query, half, rope),
                _rows(grad_key, BACKWARD_KEYS, latent_dim), _rows(grad_key, BACKWARD_KEYS, rope),
                None if tiles is None else grad_query, lse, delta, ranges, tiles,
                s, key.size(0), key.size(0) - s, ctx.scale,
                ctx.scale / math.log(2), P=pairs, G=key.size(2), L=latent_dim, R=rope, M=QUERIES,
                N=BACKWARD_KEYS, RANGES=ranges is not None, TILES=tiles is not None,
                **BACKWARD_LAUNCH,
            )  # fmt: skip
        return grad_query, grad_key.to(key.dtype), *[None] * 5


def _whole(x: Tensor) -> Tensor:
    """x, contiguous and from a multiple of 16 bytes on, as the copy engine reads it."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _rows(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Descriptor of contiguous x `[s, ...]` as `[s, the rest]`, in blocks `[rows, columns]`."""
    block = [rows, columns]
    dtype = _DTYPES.get(x.dtype, gl.float32)
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    pitch = x[0].numel()
    return TensorDescriptor(x, [x.size(0), pitch], [pitch, 1], block, layout)
