"""Absorbed keys `[c_l | rotated k_rope]`, in one pass over the latents and the RoPE key.

Letters: t tokens (s * b; token i has position i // b), `heads` latent heads, l latent dim.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def join_keys_forward(
    latents, k_rope, cos, sin, out, tokens, batch, k_row,
    heads: tl.constexpr, l: tl.constexpr, rope: tl.constexpr,
    L: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """latents `[t, heads, l]`, k_rope `[t, rope]` (rows k_row apart) -> `[t, heads, l + rope]`."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    live = (t < tokens)[:, None]
    j, r = tl.arange(0, L)[None, :], tl.arange(0, HALF)[None, :]
    half: tl.constexpr = rope // 2
    at = live & (r < half)
    angle = (t // batch)[:, None] * half + r
    t = t.to(tl.int64)[:, None]
    c, s = tl.load(cos + angle, at, 0.0), tl.load(sin + angle, at, 0.0)
    first = tl.load(k_rope + t * k_row + r, at, 0.0).to(tl.float32)
    second = tl.load(k_rope + t * k_row + half + r, at, 0.0).to(tl.float32)
    low = (first * c - second * s).to(out.dtype.element_ty)
    high = (second * c + first * s).to(out.dtype.element_ty)
    for head in range(heads):
        to = out + (t * heads + head) * (l + rope)
        x = tl.load(latents + (t * heads + head) * l + j, live & (j < l), 0.0)
        tl.store(to + j, x, live & (j < l))
        tl.store(to + l + r, low, at)
        tl.store(to + l + half + r, high, at)


@triton.jit
def join_keys_backward(
    grad, cos, sin, grad_latents, grad_k_rope, tokens, batch,
    heads: tl.constexpr, l: tl.constexpr, rope: tl.constexpr,
    L: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """grad `[t, heads, l + rope]` -> grad_latents `[t, heads, l]`, grad_k_rope `[t, rope]`."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    live = (t < tokens)[:, None]
    j, r = tl.arange(0, L)[None, :], tl.arange(0, HALF)[None, :]
    half: tl.constexpr = rope // 2
    at = live & (r < half)
    angle = (t // batch)[:, None] * half + r
    t = t.to(tl.int64)[:, None]
    low, high = tl.zeros((T, HALF), tl.float32), tl.zeros((T, HALF), tl.float32)
    for head in range(heads):
        of = grad + (t * heads + head) * (l + rope)
        x = tl.load(of + j, live & (j < l), 0.0)
        tl.store(grad_latents + (t * heads + head) * l + j, x, live & (j < l))
        low += tl.load(of + l + r, at, 0.0).to(tl.float32)
        high += tl.load(of + l + half + r, at, 0.0).to(tl.float32)
    c, s = tl.load(cos + angle, at, 0.0), tl.load(sin + angle, at, 0.0)
    to = grad_k_rope + t * rope
    tl.store(to + r, (low * c + high * s).to(grad_k_rope.dtype.element_ty), at)
    tl.store(to + half + r, (high * c - low * s).to(grad_k_rope.dtype.element_ty), at)
