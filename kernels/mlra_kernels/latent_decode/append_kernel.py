"""Triton kernel that writes new tokens to the paged latent cache in one launch.

Letters: L latent heads, D latent dim, R RoPE dim, H = R / 2 pairs that RoPE rotates.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda


@triton.jit
def latent_cache_append_kernel(
    kv_ptr,  # [tokens, L * D + R], raw output of the down projection
    weight_ptr,  # [L, D]
    cos_ptr,  # [positions, H] fp32
    sin_ptr,  # [positions, H] fp32
    position_ptr,  # [tokens]
    slot_ptr,  # [tokens]: page * PAGE + offset; a token with slot < 0 or >= slots is skipped
    latent_ptr,  # [pages, PAGE, L * D]
    rope_ptr,  # [pages, PAGE, R]
    scale_ptr,  # [pages, L, PAGE] fp32, FP8 only
    latent_scale,
    norm_eps,
    stride_kv,
    stride_cp,
    stride_ct,
    stride_rp,
    stride_rt,
    stride_sp,
    stride_sl,
    slots,
    positions,
    L: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    PAGE: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tokens, L + 1): RMSNorm and scale of a latent; the last column takes the RoPE key.

    PDL: the rule of programmatic dependent launch is in products/kernel.py.
    """
    if PDL:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    latent = tl.program_id(1)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if (slot >= 0) & (slot < slots):
        page, offset = slot // PAGE, slot % PAGE
        kv_ptr += token * stride_kv
        if latent < L:
            d = latent * D + tl.arange(0, D)
            x = tl.load(kv_ptr + d).to(tl.float32)
            x = x * tl.rsqrt(tl.sum(x * x, 0) / D + norm_eps)
            x = x * tl.load(weight_ptr + d).to(tl.float32) * latent_scale
            if FP8:
                # Largest and least pass NaN over. A latent with NaN must show, so its scale is NaN.
                scale = tl.maximum(tl.max(tl.abs(x), 0) / 448.0, 1e-12)
                scale += tl.sum(tl.where(x == x, 0.0, x), 0)
                x = tl.div_rn(x, scale)
                x = tl.where(x == x, tl.minimum(tl.maximum(x, -448.0), 448.0), x)
                tl.store(scale_ptr + page * stride_sp + latent * stride_sl + offset, scale)
            c_ptrs = latent_ptr + page * stride_cp + offset * stride_ct + d
            tl.store(c_ptrs, x.to(latent_ptr.dtype.element_ty))
        else:
            h = tl.arange(0, H)
            position = tl.load(position_ptr + token).to(tl.int64)
            # A position outside the tables gives a NaN key, so that the error shows.
            known = (position >= 0) & (position < positions) & (h < H)
            cos = tl.load(cos_ptr + position * H + h, mask=known, other=float("nan"))
            sin = tl.load(sin_ptr + position * H + h, mask=known, other=float("nan"))
            first = tl.load(kv_ptr + L * D + h).to(tl.float32)
            second = tl.load(kv_ptr + L * D + H + h).to(tl.float32)
            k_ptrs = rope_ptr + page * stride_rp + offset * stride_rt + h
            tl.store(k_ptrs, (first * cos - second * sin).to(rope_ptr.dtype.element_ty))
            tl.store(k_ptrs + H, (second * cos + first * sin).to(rope_ptr.dtype.element_ty))
