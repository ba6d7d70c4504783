"""Triton kernels that merge partial attention results by their log-sum-exp.

Letters: S parts merged per loop step, X rows per program, D columns of a row, DB columns per
program.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda


@triton.jit
def _merge_step(out_ptrs, lse_ptrs, mask, m_i, l_i, acc, EXP2: tl.constexpr):
    """Fold parts `[X, S, DB]` with lse `[X, S]` into the running (m_i, l_i, acc)."""
    lse = tl.load(lse_ptrs, mask=mask, other=float("-inf"))
    parts = tl.load(out_ptrs, mask=mask[:, :, None], other=0.0).to(tl.float32)
    if not EXP2:
        lse = lse * 1.4426950408889634
    m_new = tl.maximum(m_i, tl.max(lse, 1))
    m_use = tl.where(m_new == float("-inf"), 0.0, m_new)
    w = tl.exp2(lse - m_use[:, None])
    alpha = tl.exp2(m_i - m_use)
    # The memory of an empty part may hold anything, even NaN, and must not count. A part whose
    # log-sum-exp is NaN has a weight of NaN, and must show.
    parts = tl.where(w[:, :, None] == 0, 0.0, parts * w[:, :, None])
    return m_new, l_i * alpha + tl.sum(w, 1), acc * alpha[:, None] + tl.sum(parts, 1)


@triton.jit
def combine_kernel(
    part_out_ptr,  # [P + b, L, rows, D] fp32
    part_lse_ptr,  # [P + b, L, rows] fp32, base 2
    splits_ptr,  # [b, 2] int32: first slot, number of parts
    planned_ptr,  # [b] int32: the length that the parts were computed for
    seqlens_ptr,  # [b] int32: the length of this call
    out_ptr,  # [b, q, L, j, D]
    lse_ptr,  # [b, q, L, j] fp32, natural
    capacity,  # tokens per sequence that the block table can hold
    Q_LEN: tl.constexpr,
    HEADS: tl.constexpr,
    LATENTS: tl.constexpr,
    D: tl.constexpr,
    X: tl.constexpr,
    S: tl.constexpr,
    DB: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge the parts of split sequences, fill in empty sequences; grid (D / DB, L * rows / X, b).

    A sequence whose length is not the planned one, or exceeds the block table, gets NaN.
    """
    ROWS: tl.constexpr = Q_LEN * HEADS
    b = tl.program_id(2).to(tl.int64)
    # These inputs were complete when the decoding kernel passed its own wait: no wait here.
    length = tl.load(seqlens_ptr + b, eviction_policy="evict_last")
    planned = tl.load(planned_ptr + b, eviction_policy="evict_last")
    wrong = (length != planned) | (length > capacity)
    first = tl.load(splits_ptr + b * 2, eviction_policy="evict_last").to(tl.int64)
    parts = tl.load(splits_ptr + b * 2 + 1, eviction_policy="evict_last")
    if PDL:
        tl_cuda.gdc_launch_dependents()  # dependents wait for this kernel's end anyway
        tl_cuda.gdc_wait()
    if (parts != 1) | wrong:  # the decoding kernel wrote sequences of one part
        x = tl.program_id(1) * X + tl.arange(0, X)  # index in [L * rows]
        d = tl.program_id(0) * DB + tl.arange(0, DB)
        x_in = x < LATENTS * ROWS
        m_i = tl.full((X,), float("-inf"), tl.float32)
        l_i = tl.zeros((X,), tl.float32)
        acc = tl.zeros((X, DB), tl.float32)
        part_out_ptr += first * (LATENTS * ROWS * D)
        part_lse_ptr += first * (LATENTS * ROWS)
        for s0 in range(0, parts, S):
            s = s0 + tl.arange(0, S)
            mask = x_in[:, None] & (s < parts)[None, :]
            row = s[None, :] * (LATENTS * ROWS) + x[:, None]
            out_ptrs = part_out_ptr + ((row * D)[:, :, None] + d[None, None, :])
            m_i, l_i, acc = _merge_step(out_ptrs, part_lse_ptr + row, mask, m_i, l_i, acc, True)
        acc = acc * tl.where(l_i > 0, 1.0 / l_i, 0.0)[:, None]
        acc = tl.where(wrong, float("nan"), acc)
        lse = tl.where(wrong, float("nan"), (m_i + tl.log2(l_i)) * 0.6931471805599453)
        latent, row = x // ROWS, x % ROWS
        out_row = ((b * Q_LEN + row // HEADS) * LATENTS + latent) * HEADS + row % HEADS
        out_ptrs = out_ptr + (out_row * D)[:, None] + d[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=x_in[:, None])
        if tl.program_id(0) == 0:
            tl.store(lse_ptr + out_row, lse, mask=x_in)


@triton.jit(do_not_specialize=["total"])  # no build of its own for some numbers of rows
def merge_states_kernel(
    outs_ptr,  # [total, D]
    lses_ptr,  # [total] fp32, natural
    out_ptr,  # [rows, D]
    lse_ptr,  # [rows] fp32
    num_states,
    rows,
    total,
    D: tl.constexpr,
    DB: tl.constexpr,  # D padded to a power of two
    X: tl.constexpr,
    S: tl.constexpr,
):
    """Row r of the output merges rows r, r + rows, ... of the input, `num_states` of them where the
    input has so many; grid (rows / X,)."""
    x = tl.program_id(0).to(tl.int64) * X + tl.arange(0, X)
    d = tl.arange(0, DB)
    x_in = x < rows
    m_i = tl.full((X,), float("-inf"), tl.float32)
    l_i = tl.zeros((X,), tl.float32)
    acc = tl.zeros((X, DB), tl.float32)
    for s0 in range(0, num_states, S):
        s = s0 + tl.arange(0, S)
        row = s.to(tl.int64)[None, :] * rows + x[:, None]
        mask = x_in[:, None] & (s < num_states)[None, :] & (row < total)
        # Columns past D read the last column again, so that one mask serves; they are not stored.
        out_ptrs = outs_ptr + (row * D)[:, :, None] + tl.minimum(d, D - 1)[None, None, :]
        m_i, l_i, acc = _merge_step(out_ptrs, lses_ptr + row, mask, m_i, l_i, acc, False)
    acc = acc * tl.where(l_i > 0, 1.0 / l_i, 0.0)[:, None]
    out_ptrs = out_ptr + (x * D)[:, None] + d[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=x_in[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + x, (m_i + tl.log2(l_i)) * 0.6931471805599453, mask=x_in)
