"""The differentiable operations around the core, with the rounding points of plain torch.

Letters: s tokens, b batch, n branches, h attention heads, g head groups, l latent dim, `nope`,
`rope`, v head dims. Inputs are on one GPU in one dtype (float32, bfloat16, float16); cos and sin
are `[s, rope / 2]`, contiguous, in float32. Products accumulate in float32. Gradients are
reproducible, without atomic additions. Every operation raises ValueError if an argument does not
fit, in one line that names the value and the fix.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlra_kernels import checks
from mlra_kernels.latent_projections import absorb_kernels, key_kernels, norm_kernels

WARPS = 8
"""Warps of the matrix kernels."""

TILES = ((128, 3), (128, 2), (64, 2), (64, 1), (32, 1), (16, 1))
"""(Tokens of a program, pipeline stages) of the matrix kernels, best first."""

SHARED_BYTES = 200 * 1024
"""Most shared memory of a multiprocessor for the tiles of all stages."""

PROGRAMS = 396
"""Programs of the reducing kernels that a GPU runs at once: 3 on each of 132 multiprocessors."""

MAX_WIDTH = 65536
"""Most numbers of a part, which one program normalises."""


def rotate_absorb(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Absorbed queries `[q_i^nope w_uk_b,i | rotated q_i^rope]` of every (branch, head) pair.

    Args:
        q: `[s, b, h, nope + rope]`, not yet rotated.
        w_uk: `[n, h, nope, l]`, last dim contiguous.

    Returns:
        `[s, b, n * h, l + rope]`, branch-major. Only the arguments are saved for backward.
    """
    _check(q=q, w_uk=w_uk)
    checks.check_tensors(q=q, cos=cos, sin=sin)
    checks.check_dims("q", q, "[s, b, h, nope + rope]")
    _check_weight("w_uk", w_uk, "[n, h, nope, l]", q.size(2))
    rope = q.size(3) - w_uk.size(2)
    if rope < 2 or rope % 2:
        raise ValueError(
            f"q is {list(q.shape)} and w_uk {list(w_uk.shape)}: q's last dim is nope and an even"
            " number of RoPE dims"
        )
    checks.check_rope_tables(cos, sin, rope // 2, q.size(0))
    return _RotateAbsorb.apply(q, w_uk, cos, sin)


def join_keys(latents: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Absorbed keys `[c_l | rotated k_rope]`.

    Args:
        latents: `[s, b, n, g, l]`.
        k_rope: `[s, b, rope]`, not yet rotated.

    Returns:
        `[s, b, n * g, l + rope]`.
    """
    _check(latents=latents, k_rope=k_rope)
    checks.check_tensors(latents=latents, cos=cos, sin=sin)
    checks.check_dims("latents", latents, "[s, b, n, g, l]")
    checks.check_dims("k_rope", k_rope, "[s, b, rope]")
    rope = k_rope.size(2)
    if k_rope.shape[:2] != latents.shape[:2] or rope < 2 or rope % 2:
        raise ValueError(
            f"k_rope is {list(k_rope.shape)}, latents {list(latents.shape)}: give [s, b, rope] with"
            " the same s and b, and rope even"
        )
    checks.check_rope_tables(cos, sin, rope // 2, latents.size(0))
    return _JoinKeys.apply(latents, k_rope, cos, sin)


def sum_branches(z: Tensor, w_uv: Tensor, scale: float) -> Tensor:
    """scale * the sum over branches b of z_b,i w_uv_b,i^T: z `[s, b, n, h, l]`, w_uv
    `[n, h, v, l]` -> `[s, b, h, v]`."""
    _check(z=z, w_uv=w_uv)
    checks.check_number("scale", scale)
    checks.check_dims("z", z, "[s, b, n, h, l]")
    _check_weight("w_uv", w_uv, "[n, h, v, l]", z.size(3))
    if (z.size(2), z.size(4)) != (w_uv.size(0), w_uv.size(3)):
        raise ValueError(
            f"z is {list(z.shape)} and w_uv {list(w_uv.shape)}: give [s, b, n, h, l] and"
            " [n, h, v, l]"
        )
    return _SumBranches.apply(z, w_uv, scale)


def rms_norm(x: Tensor, weight: Tensor, eps: float, scale: float = 1.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * scale over the last dim.

    Args:
        x: `[..., parts, width]`.
        weight: `[parts, width]`, in any float dtype.
    """
    _check(x=x)
    checks.check_tensors(x=x, weight=weight)
    checks.check_dtype("weight", weight, checks.FLOAT_DTYPES)
    checks.check_number("eps", eps)
    checks.check_number("scale", scale)
    checks.check_dims("weight", weight, "[parts, width]")
    if x.dim() < 2 or x.shape[-2:] != weight.shape or not 1 <= weight.size(1) <= MAX_WIDTH:
        raise ValueError(
            f"x is {list(x.shape)} and weight {list(weight.shape)}: give [..., parts, width] and"
            f" [parts, width], width from 1 to {MAX_WIDTH}"
        )
    return _RMSNorm.apply(x, weight, eps, scale)


def _check(**tensors: Tensor) -> None:
    """Raise ValueError unless all are of one float dtype, not empty, and on one GPU."""
    checks.check_tensors(**tensors)
    first, *others = tensors
    x = tensors[first]
    checks.check_device(first, x)
    checks.check_dtype(first, x, checks.FLOAT_DTYPES)
    for name in others:
        if tensors[name].dtype != x.dtype:
            raise ValueError(f"{name} is {tensors[name].dtype}, {first} {x.dtype}: give one dtype")
    for name, tensor in tensors.items():
        if not tensor.numel():
            raise ValueError(f"{name} is {list(tensor.shape)}: give at least one of each")


def _check_weight(name: str, w: Tensor, dims: str, heads: int) -> None:
    checks.check_dims(name, w, dims)
    if w.stride(3) != 1:
        raise ValueError(f"{name} needs a contiguous last dim: call .contiguous()")
    if w.size(1) != heads or heads > checks.MAX_GRID:
        raise ValueError(
            f"{name} is {list(w.shape)} for {heads} heads: give {dims}, h being that number and at"
            f" most {checks.MAX_GRID}"
        )


def _pad(size: int) -> int:
    """The block size for `size` numbers: a power of two, at least 16 as matrix units need."""
    return max(16, triton.next_power_of_2(size))


def _tile(x: Tensor, rows: int, l: int) -> tuple[int, int]:
    """The first of TILES whose weight and token tiles fit into shared memory."""
    for tokens, stages in TILES:
        if (_pad(rows) + tokens) * _pad(l) * x.element_size() * stages <= SHARED_BYTES:
            return tokens, stages
    raise ValueError(f"latent dim {l} in {x.dtype} is too wide for these kernels; use torch")


class _RotateAbsorb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = q.contiguous()
        ctx.save_for_backward(q, w_uk, cos, sin)
        n, h, nope, l = w_uk.shape
        s, b, _, e = q.shape
        out = q.new_empty(s, b, n * h, l + e - nope)
        _launch_absorb(absorb_kernels.rotate_absorb_forward, q, w_uk, cos, sin, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, w_uk, cos, sin = ctx.saved_tensors
        grad = grad.contiguous()
        grad_q = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_q = torch.empty_like(q)
            _launch_absorb(absorb_kernels.rotate_absorb_backward, grad, w_uk, cos, sin, grad_q)
        if ctx.needs_input_grad[1]:
            grad_w = _pair_weight_gradient(q, grad, w_uk.shape).to(w_uk.dtype)
        return grad_q, grad_w, None, None


def _launch_absorb(kernel, x: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    n, h, nope, l = w_uk.shape
    s, b = x.shape[:2]
    rope, (tokens, stages) = 2 * cos.size(1), _tile(x, nope, l)
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(s * b, tokens), h)](
            x, w_uk, cos, sin, out, s * b, b, h, n, nope, rope, l, *w_uk.stride()[:3],
            NOPE=_pad(nope), L=_pad(l), HALF=triton.next_power_of_2(rope // 2),
            T=tokens, num_warps=WARPS, num_stages=stages,
        )  # fmt: skip


class _SumBranches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, w_uv: Tensor, scale: float) -> Tensor:
        z = z.contiguous()
        ctx.save_for_backward(z, w_uv)
        ctx.scale = scale
        s, b, _, h, _ = z.shape
        out = z.new_empty(s, b, h, w_uv.size(2))
        _launch_sum(absorb_kernels.sum_branches_forward, z, w_uv, out, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        z, w_uv = ctx.saved_tensors
        grad = grad.contiguous()
        grad_z = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_z = torch.empty_like(z)
            _launch_sum(absorb_kernels.sum_branches_backward, grad, w_uv, grad_z, ctx.scale)
        if ctx.needs_input_grad[1]:
            grad_w = _pair_weight_gradient(grad, z, w_uv.shape)
            grad_w = grad_w.mul_(ctx.scale).to(w_uv.dtype)
        return grad_z, grad_w, None


def _launch_sum(kernel, x: Tensor, w_uv: Tensor, out: Tensor, scale: float) -> None:
    n, h, v, l = w_uv.shape
    tokens, (block, stages) = x.size(0) * x.size(1), _tile(x, v, l)
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(tokens, block), h)](
            x, w_uv, out, tokens, h, scale, n, v, l, *w_uv.stride()[:3],
            V=_pad(v), L=_pad(l), T=block, num_warps=WARPS, num_stages=stages,
        )  # fmt: skip


def _pair_weight_gradient(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """Sum over tokens of a_i^T b_b,i.

    Args:
        a: `[s, b, h, >= rows]`.
        b: `[s, b, n * h, >= l]` or `[s, b, n, h, >= l]`.
        shape: (n, h, rows, l).

    Returns:
        `[n, h, rows, l]` float32.
    """
    n, h, rows, l = shape
    tokens = a.size(0) * a.size(1)
    step = 64 // a.element_size()
    parts = max(1, min(triton.cdiv(tokens, 8 * step), PROGRAMS // (n * h)))
    span = triton.cdiv(triton.cdiv(tokens, parts), step) * step
    out = torch.empty(parts, n, h, rows, l, dtype=torch.float32, device=a.device)
    with torch.cuda.device_of(a):
        absorb_kernels.pair_weight_gradient[(n * h, parts)](
            a, b, out, tokens, h, n, rows, l, a.size(-1), b.size(-1), span,
            ROWS=_pad(rows), L=_pad(l), T=step, num_warps=WARPS,
        )  # fmt: skip
    return out.sum(0)


class _JoinKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latents: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.shape = latents.shape
        s, b, n, g, l = latents.shape
        latents, k_rope = latents.contiguous(), k_rope.reshape(s * b, -1)
        rope = k_rope.size(1)
        out = latents.new_empty(s, b, n * g, l + rope)
        tokens = 16
        with torch.cuda.device_of(latents):
            key_kernels.join_keys_forward[(triton.cdiv(s * b, tokens),)](
                latents, k_rope, cos, sin, out, s * b, b, k_rope.stride(0), n * g, l, rope,
                L=_pad(l), HALF=triton.next_power_of_2(rope // 2), T=tokens,
            )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        s, b, n, g, l = ctx.shape
        grad = grad.contiguous()
        rope = grad.size(-1) - l
        grad_latents, grad_k_rope = grad.new_empty(ctx.shape), grad.new_empty(s, b, rope)
        tokens = 16
        with torch.cuda.device_of(grad):
            key_kernels.join_keys_backward[(triton.cdiv(s * b, tokens),)](
                grad, cos, sin, grad_latents, grad_k_rope, s * b, b, n * g, l, rope,
                L=_pad(l), HALF=triton.next_power_of_2(rope // 2), T=tokens,
            )  # fmt: skip
        return grad_latents, grad_k_rope, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, scale: float) -> Tensor:
        parts, width = weight.shape
        shape, x = x.shape, _rows(x, parts, width)
        weight = weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.constants = eps, scale
        out = x.new_empty(shape)
        block = _norm_block(width)
        with torch.cuda.device_of(x):
            norm_kernels.rms_norm_forward[(triton.cdiv(len(x), block["T"]), parts)](
                x, weight, out, len(x), x.stride(0), eps, scale, width, **block
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        parts, width = weight.shape
        block = _norm_block(width)
        programs = min(triton.cdiv(len(x), block["T"]), max(1, PROGRAMS // parts))
        span = triton.cdiv(triton.cdiv(len(x), programs), block["T"]) * block["T"]
        grad = grad.contiguous()
        grad_x = torch.empty_like(grad)
        grad_weight = torch.empty(programs, parts, width, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            norm_kernels.rms_norm_backward[(programs, parts)](
                grad, x, weight, grad_x, grad_weight, len(x), x.stride(0), *ctx.constants, span,
                width, **block,
            )  # fmt: skip
        return grad_x, grad_weight.sum(0).to(weight.dtype), None, None


def _rows(x: Tensor, parts: int, width: int) -> Tensor:
    """`[..., parts, width]` -> `[t, parts, width]`, contiguous within each token."""
    x = x.reshape(-1, parts, width)
    return x if x.stride()[1:] == (width, 1) else x.contiguous()


def _norm_block(width: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    return {"WIDTH": padded, "T": max(1, 4096 // padded), "num_warps": 4}
