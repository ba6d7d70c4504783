"""Absorbed queries and the branch sum: small matrix products fused with the copies around them.

Letters: t tokens (s * b; token i has position i // b), n branches, h heads, e = nope + rope, l
latent dim, v value dim. A program computes (block of tokens, head). Dims are padded to powers of
two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_absorb_forward(
    q, w_uk, cos, sin, out,
    tokens, batch, heads,
    n: tl.constexpr, nope: tl.constexpr, rope: tl.constexpr, l: tl.constexpr,
    w_branch, w_head, w_row,
    NOPE: tl.constexpr, L: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """q `[t, h, e]`, w_uk `[n, h, nope, l]` (strided) -> out `[t, n, h, l + rope]`."""
    head = tl.program_id(1)
    t = tl.program_id(0) * T + tl.arange(0, T)
    live = (t < tokens)[:, None]
    i, j, r = tl.arange(0, NOPE), tl.arange(0, L), tl.arange(0, HALF)
    row = (t.to(tl.int64) * heads + head) * (nope + rope)
    x = tl.load(q + row[:, None] + i[None, :], live & (i < nope)[None, :], 0.0)

    half: tl.constexpr = rope // 2
    at = live & (r < half)[None, :]
    angle = (t // batch)[:, None] * half + r[None, :]
    c, s = tl.load(cos + angle, at, 0.0), tl.load(sin + angle, at, 0.0)
    first = tl.load(q + row[:, None] + nope + r[None, :], at, 0.0).to(tl.float32)
    second = tl.load(q + row[:, None] + nope + half + r[None, :], at, 0.0).to(tl.float32)
    low, high = first * c - second * s, second * c + first * s

    for branch in range(n):
        w = w_uk + branch * w_branch + head * w_head + i[:, None] * w_row + j[None, :]
        w = tl.load(w, (i < nope)[:, None] & (j < l)[None, :], 0.0)
        y = tl.dot(x, w, input_precision="ieee")
        to = out + (((t.to(tl.int64) * n + branch) * heads + head) * (l + rope))[:, None]
        tl.store(to + j[None, :], y.to(out.dtype.element_ty), live & (j < l)[None, :])
        tl.store(to + l + r[None, :], low.to(out.dtype.element_ty), at)
        tl.store(to + l + half + r[None, :], high.to(out.dtype.element_ty), at)


@triton.jit
def rotate_absorb_backward(
    grad, w_uk, cos, sin, grad_q,
    tokens, batch, heads,
    n: tl.constexpr, nope: tl.constexpr, rope: tl.constexpr, l: tl.constexpr,
    w_branch, w_head, w_row,
    NOPE: tl.constexpr, L: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """grad `[t, n, h, l + rope]` -> grad_q `[t, h, e]`: branches summed, rotated back."""
    head = tl.program_id(1)
    t = tl.program_id(0) * T + tl.arange(0, T)
    live = (t < tokens)[:, None]
    i, j, r = tl.arange(0, NOPE), tl.arange(0, L), tl.arange(0, HALF)
    half: tl.constexpr = rope // 2
    at = live & (r < half)[None, :]

    x = tl.zeros((T, NOPE), tl.float32)
    low, high = tl.zeros((T, HALF), tl.float32), tl.zeros((T, HALF), tl.float32)
    for branch in range(n):
        of = grad + (((t.to(tl.int64) * n + branch) * heads + head) * (l + rope))[:, None]
        y = tl.load(of + j[None, :], live & (j < l)[None, :], 0.0)
        low += tl.load(of + l + r[None, :], at, 0.0).to(tl.float32)
        high += tl.load(of + l + half + r[None, :], at, 0.0).to(tl.float32)
        w = w_uk + branch * w_branch + head * w_head + i[None, :] * w_row + j[:, None]
        w = tl.load(w, (i < nope)[None, :] & (j < l)[:, None], 0.0)
        x = tl.dot(y, w, x, input_precision="ieee")

    angle = (t // batch)[:, None] * half + r[None, :]
    c, s = tl.load(cos + angle, at, 0.0), tl.load(sin + angle, at, 0.0)
    first, second = low * c + high * s, high * c - low * s
    to = grad_q + ((t.to(tl.int64) * heads + head) * (nope + rope))[:, None]
    tl.store(to + i[None, :], x.to(grad_q.dtype.element_ty), live & (i < nope)[None, :])
    tl.store(to + nope + r[None, :], first.to(grad_q.dtype.element_ty), at)
    tl.store(to + nope + half + r[None, :], second.to(grad_q.dtype.element_ty), at)


@triton.jit
def sum_branches_forward(
    z, w_uv, out, tokens, heads, scale,
    n: tl.constexpr, v: tl.constexpr, l: tl.constexpr,
    w_branch, w_head, w_row,
    V: tl.constexpr, L: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """z `[t, n, h, l]`, w_uv `[n, h, v, l]` (strided) -> out `[t, h, v]`."""
    head = tl.program_id(1)
    t = tl.program_id(0) * T + tl.arange(0, T)
    live = (t < tokens)[:, None]
    k, j = tl.arange(0, V), tl.arange(0, L)
    y = tl.zeros((T, V), tl.float32)
    for branch in range(n):
        of = z + (((t.to(tl.int64) * n + branch) * heads + head) * l)[:, None]
        x = tl.load(of + j[None, :], live & (j < l)[None, :], 0.0)
        w = w_uv + branch * w_branch + head * w_head + k[None, :] * w_row + j[:, None]
        w = tl.load(w, (k < v)[None, :] & (j < l)[:, None], 0.0)
        y = tl.dot(x, w, y, input_precision="ieee")
    to = out + ((t.to(tl.int64) * heads + head) * v)[:, None] + k[None, :]
    tl.store(to, (y * scale).to(out.dtype.element_ty), live & (k < v)[None, :])


@triton.jit
def sum_branches_backward(
    grad, w_uv, grad_z, tokens, heads, scale,
    n: tl.constexpr, v: tl.constexpr, l: tl.constexpr,
    w_branch, w_head, w_row,
    V: tl.constexpr, L: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """grad `[t, h, v]` -> grad_z `[t, n, h, l]`."""
    head = tl.program_id(1)
    t = tl.program_id(0) * T + tl.arange(0, T)
    live = (t < tokens)[:, None]
    k, j = tl.arange(0, V), tl.arange(0, L)
    of = grad + ((t.to(tl.int64) * heads + head) * v)[:, None] + k[None, :]
    y = tl.load(of, live & (k < v)[None, :], 0.0)
    for branch in range(n):
        w = w_uv + branch * w_branch + head * w_head + k[:, None] * w_row + j[None, :]
        w = tl.load(w, (k < v)[:, None] & (j < l)[None, :], 0.0)
        x = tl.dot(y, w, input_precision="ieee") * scale
        to = grad_z + (((t.to(tl.int64) * n + branch) * heads + head) * l)[:, None] + j[None, :]
        tl.store(to, x.to(grad_z.dtype.element_ty), live & (j < l)[None, :])


@triton.jit
def pair_weight_gradient(
    a, b, out, tokens, heads,
    n: tl.constexpr, rows: tl.constexpr, l: tl.constexpr,
    a_row: tl.constexpr, b_row: tl.constexpr, span,
    ROWS: tl.constexpr, L: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Partial sums over tokens of a_i^T b_b,i for every (branch, head) pair.

    a `[t, h, a_row]` (the first `rows` columns), b `[t, n, h, b_row]` (the first l columns)
    -> out `[parts, n * h, rows, l]` in float32. Program (pair, part) sums over the tokens
    `[part * span, (part + 1) * span)`.
    """
    pair, part = tl.program_id(0), tl.program_id(1)
    head = pair % heads
    i, j = tl.arange(0, ROWS), tl.arange(0, L)
    acc = tl.zeros((ROWS, L), tl.float32)
    end = tl.minimum((part + 1) * span, tokens)
    for start in range(part * span, end, T):
        t = start + tl.arange(0, T)
        live = t < end
        t = t.to(tl.int64)
        x = a + ((t * heads + head) * a_row)[None, :] + i[:, None]
        x = tl.load(x, live[None, :] & (i < rows)[:, None], 0.0)
        y = b + ((t * (n * heads) + pair) * b_row)[:, None] + j[None, :]
        y = tl.load(y, live[:, None] & (j < l)[None, :], 0.0)
        acc = tl.dot(x, y, acc, input_precision="ieee")
    to = out + ((part * n * heads + pair) * rows + i[:, None]).to(tl.int64) * l + j[None, :]
    tl.store(to, acc, (i < rows)[:, None] & (j < l)[None, :])
