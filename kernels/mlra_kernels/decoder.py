"""Small fused operations of a decoding step, one launch each: norms, rotation, SwiGLU.

Letters: T tokens, d hidden size, H heads, e dims of a head, R rotated dims, f MLP size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlra_kernels import checks

MAX_ROW = 65536
"""Most numbers of a row, which one program normalises."""


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,  # [T, d]
    residual_ptr,  # [T, d]
    weight_ptr,  # [d]
    sum_ptr,  # [T, d]
    out_ptr,  # [T, d]
    stride_x,
    eps,
    d: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d
    x = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row * d + column, mask=inside, other=0.0).to(tl.float32)
        x = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * d + column, x, mask=inside)
        x = x.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x, 0) / d + eps) * weight
    tl.store(out_ptr + row * d + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`x + residual` and its RMSNorm, with statistics in fp32.

    Args:
        x: `[T, d]` with contiguous rows, in a float dtype on a GPU.
        residual: `[T, d]` contiguous, in x's dtype; or None, for x itself.
        weight: `[d]` contiguous, in any float dtype.

    Returns:
        (sum, norm), both `[T, d]` in x's dtype.

    Raises:
        ValueError: an argument does not fit; the message names the value and the fix.
    """
    checks.check_tensors(x=x, weight=weight, **({} if residual is None else {"residual": residual}))
    checks.check_device("x", x)
    checks.check_dims("x", x, "[T, d]")
    checks.check_number("eps", eps)
    tokens, d = x.shape
    if not 1 <= d <= MAX_ROW or x.stride(1) != 1:
        raise ValueError(
            f"x is {tuple(x.shape)} with strides {x.stride()}: give [T, d] with contiguous rows of"
            f" 1 to {MAX_ROW} numbers"
        )
    checks.check_dtype("x", x, checks.FLOAT_DTYPES)
    checks.check_dtype("weight", weight, checks.FLOAT_DTYPES)
    if weight.shape != (d,):
        raise ValueError(f"weight is {tuple(weight.shape)}: give [{d}], one number a column of x")
    checks.check_contiguous(weight=weight)
    if residual is not None:
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(
                f"residual is {tuple(residual.shape)} {residual.dtype}, x {tuple(x.shape)}"
                f" {x.dtype}: give both alike"
            )
        checks.check_contiguous(residual=residual)
    out = torch.empty(tokens, d, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    block = triton.next_power_of_2(d)
    with torch.cuda.device_of(x):
        _add_rms_norm_kernel[(tokens,)](
            x, x if residual is None else residual, weight, total, out, x.stride(0), eps,
            d=d, BLOCK=block, ADD=residual is not None, num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
    return total, out


@triton.jit
def _silu_mul_kernel(
    x_ptr,  # [T, 2 f]
    out_ptr,  # [T, f]
    f,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < f
    gate = tl.load(x_ptr + row * 2 * f + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * f + f + column, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * f + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of `[T, 2 f]` (contiguous, on a GPU), `[T, f]`.

    Raises:
        ValueError: an argument does not fit; the message names the value and the fix.
    """
    checks.check_tensors(gate_up=gate_up)
    checks.check_device("gate_up", gate_up)
    checks.check_dtype("gate_up", gate_up, checks.FLOAT_DTYPES)
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or not gate_up.shape[1]:
        raise ValueError(f"gate_up is {tuple(gate_up.shape)}: give [T, 2 f]")
    checks.check_contiguous(gate_up=gate_up)
    tokens, f = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, f, dtype=gate_up.dtype, device=gate_up.device)
    with torch.cuda.device_of(gate_up):
        _silu_mul_kernel[(tokens, triton.cdiv(f, 1024))](gate_up, out, f, BLOCK=1024, num_warps=4)
    return out


@triton.jit
def _rotate_heads_kernel(
    x_ptr,  # [T, H, e]
    cos_ptr,  # [positions, R / 2] fp32
    sin_ptr,
    position_ptr,  # [T] int32 or int64
    stride_t,
    stride_h,
    start,
    positions,
    HALF: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, HALF)
    position = tl.load(position_ptr + token).to(tl.int64)
    known = (position >= 0) & (position < positions) & (i < HALF)
    cos = tl.load(cos_ptr + position * HALF + i, mask=known, other=float("nan"))
    sin = tl.load(sin_ptr + position * HALF + i, mask=known, other=float("nan"))
    x_ptr += token * stride_t + head * stride_h + start
    first = tl.load(x_ptr + i).to(tl.float32)
    second = tl.load(x_ptr + HALF + i).to(tl.float32)
    tl.store(x_ptr + i, (first * cos - second * sin).to(x_ptr.dtype.element_ty))
    tl.store(x_ptr + HALF + i, (second * cos + first * sin).to(x_ptr.dtype.element_ty))


def rotate_heads(x: Tensor, start: int, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotate dims `start` to e - 1 of every head in place (half-split RoPE) and return x.

    Args:
        x: `[T, H, e]` on a GPU, last dim contiguous; e - start = R, R / 2 a power of two.
        cos, sin: `[positions, R / 2]` fp32, contiguous.
        positions: `[T]` int32 or int64, contiguous. A position outside the tables gives NaN.

    Raises:
        ValueError: an argument does not fit; the message names the value and the fix.
    """
    checks.check_tensors(x=x, cos=cos, sin=sin, positions=positions)
    checks.check_device("x", x)
    checks.check_dims("x", x, "[T, H, e]")
    checks.check_dtype("x", x, checks.FLOAT_DTYPES)
    if x.stride(2) != 1:
        raise ValueError("x needs a contiguous last dim: call .contiguous()")
    checks.check_reach("a token of x", x, 1)
    tokens, heads, width = x.shape
    checks.check_integer("start", start, 0, max(width - 2, 0))
    half = (width - start) // 2
    if not 1 <= half <= MAX_ROW or half & (half - 1) or width - start != 2 * half:
        raise ValueError(f"x rotates {width - start} dims from {start} on: make it a power of two")
    if heads > checks.MAX_GRID:
        raise ValueError(f"x has {heads} heads: give at most {checks.MAX_GRID}")
    checks.check_rope_tables(cos, sin, half, "positions")
    checks.check_dtype("positions", positions, checks.INDEX_DTYPES)
    if positions.shape != (tokens,):
        raise ValueError(f"positions is {tuple(positions.shape)}: give [{tokens}]")
    checks.check_contiguous(positions=positions)
    with torch.cuda.device_of(x):
        _rotate_heads_kernel[(tokens, heads)](
            x, cos, sin, positions, x.stride(0), x.stride(1), start, len(cos), HALF=half,
            num_warps=1,
        )  # fmt: skip
    return x
