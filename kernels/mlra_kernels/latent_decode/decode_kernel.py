"""Triton kernel of latent decoding: split-KV attention over pages, K and V from one load.

Letters: b sequences, q query tokens per sequence, L latent heads, G head groups, j heads per latent
head, M query rows per program (rows = q * j, padded), N cached tokens per tile, D latent dim,
R RoPE dim, P programs.

A program takes one (latent, block of rows) and a contiguous range of tiles, which the schedule
gives (metadata.py). The range may cross sequences. A tile `c [N, D]` is loaded once: it is the key
(with the RoPE key `k_r [N, R]`) and the value. Scores are kept in base 2.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

NEVER_SEEN = tl.constexpr(-1.0e30)  # running maximum of a row that has seen no token


@triton.jit
def _load_tile(
    latent_ptr,
    rope_ptr,
    scale_ptr,
    table_ptr,
    max_pages,
    num_pages,
    tile,
    seqlen,
    stride_cp,
    stride_ct,
    stride_rp,
    stride_rt,
    stride_sp,
    N: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    FP8: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return c [N, D], k_r [N, R], scale [N] of a tile; MASKED: rows past `seqlen` read as 0.

    No read leaves the table or the cache, whatever the lengths and page ids are.
    """
    n = tl.arange(0, N)
    inside = tile * N + n < seqlen
    if PAGE % N == 0:  # one page holds the tile: its id is one scalar
        page = tl.load(table_ptr + tile * N // PAGE, eviction_policy="evict_last")
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1).to(tl.int64)
        row = tile * N % PAGE + n
        c_ptrs = latent_ptr + page * stride_cp + (row * stride_ct)[:, None]
        r_ptrs = rope_ptr + page * stride_rp + (row * stride_rt)[:, None]
        s_ptrs = scale_ptr + page * stride_sp + row
    else:
        token = tile * N + n
        entries = tl.minimum(token // PAGE, max_pages - 1)
        if MASKED:
            pages = tl.load(table_ptr + entries, mask=inside, other=0)
        else:
            pages = tl.load(table_ptr + entries)
        pages = tl.minimum(tl.maximum(pages, 0), num_pages - 1).to(tl.int64)
        row = token % PAGE
        c_ptrs = latent_ptr + (pages * stride_cp + row * stride_ct)[:, None]
        r_ptrs = rope_ptr + (pages * stride_rp + row * stride_rt)[:, None]
        s_ptrs = scale_ptr + pages * stride_sp + row
    c_ptrs += tl.arange(0, D)[None, :]
    r_ptrs += tl.arange(0, R)[None, :]
    scale = tl.full((N,), 1.0, tl.float32)
    if MASKED:
        c = tl.load(c_ptrs, mask=inside[:, None], other=0.0)
        k_r = tl.load(r_ptrs, mask=inside[:, None], other=0.0)
        if FP8:
            scale = tl.load(s_ptrs, mask=inside, other=0.0)
    else:
        c = tl.load(c_ptrs)
        k_r = tl.load(r_ptrs)
        if FP8:
            scale = tl.load(s_ptrs)
    return c, k_r, scale


@triton.jit
def _attend(
    q_c,
    q_r,
    c,
    k_r,
    scale,
    m_i,
    l_i,
    acc,
    tile,
    last_seen,
    scale_log2,
    N: tl.constexpr,
    FP8: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One online-softmax step of the rows over a tile; returns the new (m_i, l_i, acc)."""
    c = c.to(q_c.dtype)
    s = tl.dot(q_c, tl.trans(c), input_precision=PRECISION)
    if FP8:  # the token's scale factors out of the dot product
        s = s * scale[None, :]
    s = tl.dot(q_r, tl.trans(k_r.to(q_r.dtype)), s, input_precision=PRECISION)
    if MASKED:
        seen = tile * N + tl.arange(0, N)[None, :] <= last_seen[:, None]
        s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    if FP8:
        p = p * scale[None, :]
    acc = tl.dot(p.to(q_c.dtype), c, acc, input_precision=PRECISION)
    return m_new, l_i, acc


@triton.jit
def latent_decode_kernel(
    q_ptr,  # [b, q, L, j, D]
    q_rope_ptr,  # [b, q, G * j, R]
    latent_ptr,  # [pages, PAGE, L * D]
    rope_ptr,  # [pages, PAGE, R]
    scale_ptr,  # [pages, L, PAGE] fp32, FP8 only
    table_ptr,  # [b, max_pages] int32
    seqlens_ptr,  # [b] int32, the lengths that the schedule was made for
    schedule_ptr,  # [P, 4] int32: first sequence, first tile, tiles, length of the sequence
    out_ptr,  # [b, q, L, j, D]
    lse_ptr,  # [b, q, L, j] fp32
    part_out_ptr,  # [P + b, L, rows, D] fp32
    part_lse_ptr,  # [P + b, L, rows] fp32, base 2
    scale_log2,  # softmax scale * log2(e)
    stride_qb,
    stride_qq,
    stride_ql,
    stride_qj,
    stride_qrb,
    stride_qrq,
    stride_qrh,
    stride_cp,
    stride_ct,
    stride_rp,
    stride_rt,
    stride_sp,
    stride_sl,
    stride_tb,
    max_tiles,  # tiles per sequence that the block table can hold
    max_pages,
    num_pages,
    Q_LEN: tl.constexpr,
    HEADS: tl.constexpr,
    LATENTS: tl.constexpr,
    GROUPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    FP8: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    ROWS: tl.constexpr = Q_LEN * HEADS
    if PDL:
        tl_cuda.gdc_wait()
    latent = tl.program_id(0) % LATENTS
    row = tl.program_id(0) // LATENTS * M + tl.arange(0, M)
    program = tl.program_id(1)
    b = tl.load(schedule_ptr + program * 4, eviction_policy="evict_last")
    tile = tl.load(schedule_ptr + program * 4 + 1, eviction_policy="evict_last")
    left = tl.load(schedule_ptr + program * 4 + 2, eviction_policy="evict_last")
    seqlen = tl.load(schedule_ptr + program * 4 + 3, eviction_policy="evict_last")

    row_in = row < ROWS
    q_tok, j = row // HEADS, row % HEADS
    q_off = q_tok * stride_qq + latent * stride_ql + j * stride_qj
    q_ptrs = q_ptr + q_off[:, None] + tl.arange(0, D)[None, :]
    qr_off = q_tok * stride_qrq + (latent % GROUPS * HEADS + j) * stride_qrh
    qr_ptrs = q_rope_ptr + qr_off[:, None] + tl.arange(0, R)[None, :]
    latent_ptr += latent * D
    scale_ptr += latent * stride_sl

    while left > 0:
        tiles = tl.cdiv(seqlen, N)
        take = tl.minimum(left, tiles - tile)
        if take > 0:
            b64 = b.to(tl.int64)
            q_c = tl.load(q_ptrs + b64 * stride_qb, mask=row_in[:, None], other=0.0)
            q_r = tl.load(qr_ptrs + b64 * stride_qrb, mask=row_in[:, None], other=0.0)
            seq_table = table_ptr + b64 * stride_tb
            m_i = tl.full((M,), NEVER_SEEN, tl.float32)
            l_i = tl.zeros((M,), tl.float32)
            acc = tl.zeros((M, D), tl.float32)
            end = tl.minimum(tile + take, max_tiles)
            # Every row sees all tokens of the tiles before `full_end`.
            full_end = tl.minimum(end, tl.maximum(seqlen - Q_LEN + 1, 0) // N)
            for t in tl.range(tile, full_end, num_stages=STAGES):
                c, k_r, scale = _load_tile(
                    latent_ptr, rope_ptr, scale_ptr, seq_table, max_pages, num_pages, t, seqlen,
                    stride_cp, stride_ct, stride_rp, stride_rt, stride_sp,
                    N, D, R, PAGE, FP8, False,
                )  # fmt: skip
                m_i, l_i, acc = _attend(
                    q_c, q_r, c, k_r, scale, m_i, l_i, acc, t, row,
                    scale_log2, N, FP8, False, PRECISION,
                )  # fmt: skip
            last_seen = seqlen - Q_LEN + q_tok
            for t in tl.range(tl.maximum(tile, full_end), end, num_stages=1):
                c, k_r, scale = _load_tile(
                    latent_ptr, rope_ptr, scale_ptr, seq_table, max_pages, num_pages, t, seqlen,
                    stride_cp, stride_ct, stride_rp, stride_rt, stride_sp,
                    N, D, R, PAGE, FP8, True,
                )  # fmt: skip
                m_i, l_i, acc = _attend(
                    q_c, q_r, c, k_r, scale, m_i, l_i, acc, t, last_seen,
                    scale_log2, N, FP8, True, PRECISION,
                )  # fmt: skip
            if PDL:
                tl_cuda.gdc_launch_dependents()
            acc = acc * tl.where(l_i > 0, 1.0 / l_i, 0.0)[:, None]
            lse = m_i + tl.log2(l_i)  # -inf for a row that saw nothing
            if take == tiles:
                out_row = ((b64 * Q_LEN + q_tok) * LATENTS + latent) * HEADS + j
                tl.store(lse_ptr + out_row, lse * 0.6931471805599453, mask=row_in)
                out_ptrs = out_ptr + (out_row * D)[:, None] + tl.arange(0, D)[None, :]
                tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=row_in[:, None])
            else:
                part_row = ((program + b64) * LATENTS + latent) * ROWS + row
                tl.store(part_lse_ptr + part_row, lse, mask=row_in)
                part_ptrs = part_out_ptr + (part_row * D)[:, None] + tl.arange(0, D)[None, :]
                tl.store(part_ptrs, acc, mask=row_in[:, None])
            left -= take
        b += 1
        tile = 0
        if left > 0:
            seqlen = tl.load(seqlens_ptr + b, eviction_policy="evict_last")
