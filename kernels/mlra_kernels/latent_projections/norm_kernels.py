"""RMSNorm of equal parts of a row, times weight and scale: one pass forward, one pass backward.

A program computes a block of tokens of one part. Statistics are in float32. Letters: t tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_forward(
    x, weight, out, tokens, x_row, eps, scale,
    width: tl.constexpr, WIDTH: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """x `[t, parts, width]` (rows x_row apart), weight `[parts, width]` -> out, contiguous."""
    part, parts = tl.program_id(1), tl.num_programs(1)
    t = tl.program_id(0) * T + tl.arange(0, T)
    i = tl.arange(0, WIDTH)
    at = (t < tokens)[:, None] & (i < width)[None, :]
    t = t.to(tl.int64)[:, None]
    y = tl.load(x + t * x_row + part * width + i[None, :], at, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(y * y, 1) / width + eps)
    w = tl.load(weight + part * width + i, i < width, 0.0).to(tl.float32) * scale
    y = y * inverse[:, None] * w[None, :]
    to = out + (t * parts + part) * width + i[None, :]
    tl.store(to, y.to(out.dtype.element_ty), at)


@triton.jit
def rms_norm_backward(
    grad, x, weight, grad_x, grad_weight, tokens, x_row, eps, scale, span,
    width: tl.constexpr, WIDTH: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """grad `[t, parts, width]` -> grad_x, and grad_weight `[programs, parts, width]` in float32.

    With y = x r and r = rsqrt(mean x^2 + eps): dx = r (g w - y mean(g w y)), and dw is the sum of
    g y over tokens. A program reads `span` tokens, T at a time.
    """
    block, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    i = tl.arange(0, WIDTH)
    w = tl.load(weight + part * width + i, i < width, 0.0).to(tl.float32)[None, :] * scale
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(block * span, (block + 1) * span, T):
        t = start + tl.arange(0, T)
        at = (t < tokens)[:, None] & (i < width)[None, :]
        t = t.to(tl.int64)[:, None]
        row = (t * parts + part) * width + i[None, :]
        y = tl.load(x + t * x_row + part * width + i[None, :], at, 0.0).to(tl.float32)
        g = tl.load(grad + row, at, 0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(y * y, 1) / width + eps)[:, None]
        y *= inverse
        total += tl.sum(g * y, 0)
        g *= w
        dx = inverse * (g - y * (tl.sum(g * y, 1) / width)[:, None])
        tl.store(grad_x + row, dx.to(grad_x.dtype.element_ty), at)
    to = grad_weight + (block * parts + part) * width + i
    tl.store(to, total * scale, i < width)
