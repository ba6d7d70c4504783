"""Gluon kernel of latent decoding for Hopper: a ring of TMA-loaded tiles, one warp loads, the rest compute.

Letters: b sequences, q query tokens a sequence, L latent heads, G head groups, j heads a latent serves,
M query rows of a program (rows = q * j, padded), N cached tokens of a tile, D latent dim, R RoPE dim.

The same work split, layouts and results as `decode_kernel.py`; needs page_size % N == 0 and pages that
follow each other in memory. A tile `c [N, D]` is loaded once: it is the key (with the RoPE key
`k_r [N, R]`) and the value. Scores are kept in base 2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

NEVER_SEEN = gl.constexpr(-1.0e30)  # running maximum of a row that has seen no token


@gluon.jit
def _next_slot(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wrap = stage == STAGES
    return gl.where(wrap, 0, stage), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def _produce(
    c_desc, r_desc, table_ptr, seqlens_ptr, b, tile, left, c_ring, r_ring, full, empty,
    c_col, r_col, stride_tb, N: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load every tile of the program's range into the ring, in order."""
    BYTES: gl.constexpr = c_desc.block_type.nbytes + r_desc.block_type.nbytes
    stage = 0
    phase = 1
    while left > 0:
        seqlen = gl.load(seqlens_ptr + b)
        take = gl.minimum(left, gl.cdiv(seqlen, N) - tile)
        seq_table = table_ptr + b.to(gl.int64) * stride_tb
        for t in range(tile, tile + take):
            row = gl.load(seq_table + t * N // PAGE) * PAGE + t * N % PAGE
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), BYTES)
            tma.async_copy_global_to_shared(
                c_desc, [row, c_col], full.index(stage), c_ring.index(stage)
            )
            tma.async_copy_global_to_shared(
                r_desc, [row, r_col], full.index(stage), r_ring.index(stage)
            )
            stage, phase = _next_slot(stage, phase, STAGES)
        left -= take
        b += 1
        tile = 0


@gluon.jit
def _zero_rows(ring_tile, rows_in, N: gl.constexpr, C: gl.constexpr):
    """Zero the rows of a shared tile `[N, C]` from `rows_in` on: unused cache may hold NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    x = ring_tile.load(LAYOUT)
    n = gl.arange(0, N, gl.SliceLayout(1, LAYOUT))
    ring_tile.store(gl.where((n < rows_in)[:, None], x, 0.0).to(x.dtype))


@gluon.jit
def _consume(
    q_ptr, q_rope_ptr, seqlens_ptr, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr,
    b, tile, left, program, latent, row0, q_smem, qr_smem, p_smem, c_ring, r_ring, full, empty,
    scale_log2, stride_qb, stride_qq, stride_ql, stride_qj, stride_qrb, stride_qrq, stride_qrh,
    Q_LEN: gl.constexpr, HEADS: gl.constexpr, LATENTS: gl.constexpr, GROUPS: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, R: gl.constexpr, STAGES: gl.constexpr,
    WARPS_N: gl.constexpr,
):  # fmt: skip
    """Online softmax over the ring's tiles; write a finished sequence or its part."""
    ROWS: gl.constexpr = Q_LEN * HEADS
    WARPS_M: gl.constexpr = gl.num_warps() // WARPS_N
    S_N: gl.constexpr = N // WARPS_N
    O_N: gl.constexpr = D // WARPS_N if D // WARPS_N < 256 else 256
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS_M, WARPS_N], [16, S_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS_M, WARPS_N], [16, O_N, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    Q_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    Q_ROW: gl.constexpr = gl.SliceLayout(1, Q_LAYOUT)

    row_q = row0 + gl.arange(0, M, Q_ROW)
    token_q, j_q = row_q // HEADS, row_q % HEADS
    q_off = token_q * stride_qq + latent * stride_ql + j_q * stride_qj
    qr_off = token_q * stride_qrq + (latent % GROUPS * HEADS + j_q) * stride_qrh
    col_q = gl.arange(0, D, gl.SliceLayout(0, Q_LAYOUT))
    col_qr = gl.arange(0, R, gl.SliceLayout(0, Q_LAYOUT))
    row_s = row0 + gl.arange(0, M, S_ROW)
    row_o = row0 + gl.arange(0, M, O_ROW)
    col_o = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
    col_s = gl.arange(0, N, gl.SliceLayout(0, S_LAYOUT))

    stage = 0
    phase = 0
    while left > 0:
        seqlen = gl.load(seqlens_ptr + b)
        tiles = gl.cdiv(seqlen, N)
        take = gl.minimum(left, tiles - tile)
        if take > 0:
            b64 = b.to(gl.int64)
            mask_q = (row_q < ROWS)[:, None]
            q_ptrs = q_ptr + b64 * stride_qb + q_off[:, None] + col_q[None, :]
            q_smem.store(gl.load(q_ptrs, mask=mask_q, other=0.0))
            qr_ptrs = q_rope_ptr + b64 * stride_qrb + qr_off[:, None] + col_qr[None, :]
            qr_smem.store(gl.load(qr_ptrs, mask=mask_q, other=0.0))
            fence_async_shared()
            m_i = gl.full([M], NEVER_SEEN, gl.float32, S_ROW)
            l_i = gl.full([M], 0.0, gl.float32, S_ROW)
            acc = gl.zeros([M, D], gl.float32, O_LAYOUT)
            last_seen = seqlen - Q_LEN + row_s // HEADS
            # Tiles before `full_end` are seen whole by every row.
            full_end = gl.maximum(seqlen - Q_LEN + 1, 0) // N
            for t in range(tile, tile + take):
                mbarrier.wait(full.index(stage), phase)
                c = c_ring.index(stage)
                k_r = r_ring.index(stage)
                if (t + 1) * N > seqlen:
                    _zero_rows(c, seqlen - t * N, N, D)
                    _zero_rows(k_r, seqlen - t * N, N, R)
                    fence_async_shared()
                s = gl.zeros([M, N], gl.float32, S_LAYOUT)
                s = warpgroup_mma(q_smem, c.permute((1, 0)), s, use_acc=False, is_async=True)
                s = warpgroup_mma(qr_smem, k_r.permute((1, 0)), s, is_async=True)
                s = warpgroup_mma_wait(0, deps=[s])
                if t >= full_end:
                    seen = (t * N + col_s)[None, :] <= last_seen[:, None]
                    s = gl.where(seen, s, float("-inf"))
                m_new = gl.maximum(m_i, gl.max(s, 1) * scale_log2)
                p = gl.exp2(s * scale_log2 - m_new[:, None])
                alpha = gl.exp2(m_i - m_new)
                l_i = l_i * alpha + gl.sum(p, 1)
                m_i = m_new
                acc = acc * gl.convert_layout(alpha, O_ROW)[:, None]
                if WARPS_N == 1:
                    p_op = gl.convert_layout(p.to(q_smem.dtype), P_LAYOUT)
                    acc = warpgroup_mma(p_op, c, acc, is_async=True)
                else:  # each column warpgroup needs the probabilities of both
                    p_smem.store(p.to(q_smem.dtype))
                    fence_async_shared()
                    acc = warpgroup_mma(p_smem, c, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = _next_slot(stage, phase, STAGES)
            inv = gl.where(l_i > 0, 1.0 / l_i, 0.0)
            acc = acc * gl.convert_layout(inv, O_ROW)[:, None]
            lse = m_i + gl.log2(l_i)  # -inf for a row that saw nothing
            if take == tiles:
                out_s = ((b64 * Q_LEN + row_s // HEADS) * LATENTS + latent) * HEADS + row_s % HEADS
                gl.store(lse_ptr + out_s, lse * 0.6931471805599453, mask=row_s < ROWS)
                out_o = ((b64 * Q_LEN + row_o // HEADS) * LATENTS + latent) * HEADS + row_o % HEADS
                out_ptrs = out_ptr + (out_o * D)[:, None] + col_o[None, :]
                gl.store(out_ptrs, acc.to(q_smem.dtype), mask=(row_o < ROWS)[:, None])
            else:
                part_row = ((program + b64) * LATENTS + latent) * ROWS
                gl.store(part_lse_ptr + part_row + row_s, lse, mask=row_s < ROWS)
                part_ptrs = part_out_ptr + ((part_row + row_o) * D)[:, None] + col_o[None, :]
                gl.store(part_ptrs, acc, mask=(row_o < ROWS)[:, None])
        left -= take
        b += 1
        tile = 0


@gluon.jit
def latent_decode_hopper_kernel(
    q_ptr,  # [b, q, L, j, D]
    q_rope_ptr,  # [b, q, G * j, R]
    c_desc,  # tiles [N, D] of the cache as [pages * PAGE, L * D + R]
    r_desc,  # tiles [N, R] of the same
    table_ptr,  # [b, max_pages] int32
    seqlens_ptr,  # [b] int32
    schedule_ptr,  # [P, 4] int32: first sequence, first tile, tiles, unused
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
    stride_tb,
    Q_LEN: gl.constexpr,
    HEADS: gl.constexpr,
    LATENTS: gl.constexpr,
    GROUPS: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    D: gl.constexpr,
    R: gl.constexpr,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS_N: gl.constexpr,
):
    DTYPE: gl.constexpr = c_desc.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D], DTYPE)
    qr_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, R], DTYPE)
    q_smem = gl.allocate_shared_memory(DTYPE, [M, D], q_layout)
    qr_smem = gl.allocate_shared_memory(DTYPE, [M, R], qr_layout)
    P_M: gl.constexpr = M if WARPS_N > 1 else 16
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([P_M, N], DTYPE)
    p_smem = gl.allocate_shared_memory(DTYPE, [P_M, N], p_layout)
    c_ring = gl.allocate_shared_memory(DTYPE, [STAGES, N, D], c_desc.layout)
    r_ring = gl.allocate_shared_memory(DTYPE, [STAGES, N, R], r_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    latent = gl.program_id(0) % LATENTS
    row0 = gl.program_id(0) // LATENTS * M
    program = gl.program_id(1)
    b = gl.load(schedule_ptr + program * 4)
    tile = gl.load(schedule_ptr + program * 4 + 1)
    left = gl.load(schedule_ptr + program * 4 + 2)
    gl.warp_specialize(
        [
            (_consume, (
                q_ptr, q_rope_ptr, seqlens_ptr, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr,
                b, tile, left, program, latent, row0, q_smem, qr_smem, p_smem, c_ring, r_ring,
                full, empty, scale_log2, stride_qb, stride_qq, stride_ql, stride_qj,
                stride_qrb, stride_qrq, stride_qrh,
                Q_LEN, HEADS, LATENTS, GROUPS, M, N, D, R, STAGES, WARPS_N,
            )),
            (_produce, (
                c_desc, r_desc, table_ptr, seqlens_ptr, b, tile, left, c_ring, r_ring,
                full, empty, latent * D, LATENTS * D, stride_tb, N, PAGE, STAGES,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip
