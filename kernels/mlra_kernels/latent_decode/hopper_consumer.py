"""What a consumer of the Hopper kernel does: attends to its share of the tiles in the ring.

Letters and layouts: hopper_kernel.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

FP16_MAX = gl.constexpr(65504.0)
SCALE_MAX = gl.constexpr(146.0)  # times 448, the largest e4m3: just inside fp16
NEVER_SEEN = gl.constexpr(-1.0e30)  # running maximum of a row that has seen no token


@gluon.jit
def _zero_rows(ring_tile, rows_in, N: gl.constexpr):
    """Zero the rows of a shared tile of N rows from `rows_in` on: unused cache may hold NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    x = ring_tile.load(LAYOUT)
    n = gl.arange(0, N, gl.SliceLayout(1, LAYOUT))
    ring_tile.store(gl.where((n < rows_in)[:, None], x, 0.0).to(x.dtype))


@gluon.jit
def _widen(c, scale, wide, rows_in, N: gl.constexpr):
    """Write an FP8 shared tile `[N, D]` times its tokens' scales `[N]` to `wide`, as fp16.

    Scales from row `rows_in` on count as 0: unused cache may hold NaN.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    row_scale = gl.where(gl.arange(0, N, ROW) < rows_in, scale.load(ROW), 0.0)
    row_scale = gl.minimum(row_scale, SCALE_MAX).to(gl.float16)
    x, row_scale = gl.broadcast(c.load(LAYOUT), row_scale[:, None])
    x = gl.inline_asm_elementwise(  # the compiler alone would multiply one number at a time
        """{
        .reg .b16 low, high;
        mov.b32 {low, high}, $2;
        cvt.rn.f16x2.e4m3x2 $0, low;
        cvt.rn.f16x2.e4m3x2 $1, high;
        mul.rn.f16x2 $0, $0, $3;
        mul.rn.f16x2 $1, $1, $4;
        }""",
        "=&r,=&r,r,r,r", [x, row_scale], dtype=gl.float16, is_pure=True, pack=4,
    )  # fmt: skip
    wide.store(x)


@gluon.jit
def _own_sums(p, S_N: gl.constexpr):
    """Per-thread partial sums of the rows of a score tile `[M, N]`: `[M, N / S_N, 4]`.

    No thread waits for another; the sum over the threads of a row is taken once per sequence.
    """
    M: gl.constexpr = p.shape[0]
    parts = p.reshape([M, p.shape[1] // S_N, S_N // 8, 4, 2])
    return gl.sum(gl.sum(parts, 4), 2)


@gluon.jit
def _merge(acc, m_i, l_i, m_o, l_o, other, O_ROW: gl.constexpr):
    """Merge the state (other, m_o, l_o) of another consumer into (acc, m_i, l_i)."""
    m_new = gl.maximum(m_i, m_o)
    a_i = gl.exp2(m_i - m_new)
    a_o = gl.exp2(m_o - m_new)
    acc = acc * gl.convert_layout(a_i, O_ROW)[:, None]
    acc += other * gl.convert_layout(a_o, O_ROW)[:, None]
    return acc, m_new, l_i * a_i + l_o * a_o


@gluon.jit
def consume(
    args, Q_LEN: gl.constexpr, HEADS: gl.constexpr, LATENTS: gl.constexpr, GROUPS: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, R: gl.constexpr, FP8: gl.constexpr,
    STAGES: gl.constexpr, WARPS_N: gl.constexpr, W: gl.constexpr, w: gl.constexpr,
):  # fmt: skip
    """Consumer w: online softmax over every W-th tile; consumer 0 merges the others and writes."""
    (
        q_ptr, q_rope_ptr, seqlens_ptr, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr,
        b, tile, left, seqlen, program, latent, row0, q_smem, qr_smem, p_smem, wide_ring,
        c_ring, r_ring, s_ring, x_acc, x_m, x_l, full, empty, q_full, x_full, x_empty,
        scale_log2, stride_qb, stride_qq, stride_ql, stride_qj, stride_qrb, stride_qrq, stride_qrh,
        max_tiles,
    ) = args  # fmt: skip
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
    # With widened FP8 tiles, shared memory is the bottleneck, so the queries stay in registers. Not
    # where both products have one instruction shape (D = N): ptxas 12.8 then gives the queries'
    # registers to the probabilities, although the next tile needs the queries again.
    Q_IN_REGISTERS: gl.constexpr = FP8 and D == 128 and N == 64

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

    loaded = 0  # tiles that went through the ring before this sequence
    segment = 0
    while left > 0:
        tiles = gl.cdiv(seqlen, N)
        take = gl.minimum(left, tiles - tile)
        if take > 0:
            b64 = b.to(gl.int64)
            if w == 0:
                mask_q = (row_q < ROWS)[:, None]
                q_ptrs = q_ptr + b64 * stride_qb + q_off[:, None] + col_q[None, :]
                q = gl.load(q_ptrs, mask=mask_q, other=0.0)
                if FP8 and q.dtype != gl.float16:
                    q = q.to(gl.float32)
                    q = gl.where(q == q, gl.maximum(gl.minimum(q, FP16_MAX), -FP16_MAX), q)
                q_smem.store(q.to(q_smem.dtype))
                qr_ptrs = q_rope_ptr + b64 * stride_qrb + qr_off[:, None] + col_qr[None, :]
                qr_smem.store(gl.load(qr_ptrs, mask=mask_q, other=0.0).to(qr_smem.dtype))
                fence_async_shared()
                if W > 1:
                    mbarrier.arrive(q_full, count=1)
            else:
                mbarrier.wait(q_full, segment & 1)
            m_i = gl.full([M], NEVER_SEEN, gl.float32, S_ROW)
            l_own = _own_sums(gl.zeros([M, N], gl.float32, S_LAYOUT), S_N)
            L_ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, l_own.type.layout))
            acc = gl.zeros([M, D], gl.float32, O_LAYOUT)
            last_seen = seqlen - Q_LEN + row_s // HEADS
            # Every row sees all tokens of the tiles before `full_end`.
            full_end = gl.maximum(seqlen - Q_LEN + 1, 0) // N
            q_op = q_smem
            qr_op = qr_smem
            if Q_IN_REGISTERS:
                q_op = q_smem.load(gl.DotOperandLayout(0, S_LAYOUT, 2))
                qr_op = qr_smem.load(gl.DotOperandLayout(0, S_LAYOUT, 2))
            held = gl.maximum(gl.minimum(take, max_tiles - tile), 0)
            for i in range(w, held, W):
                t = tile + i
                stage = (loaded + i) % STAGES
                mbarrier.wait(full.index(stage), (loaded + i) // STAGES & 1)
                c = c_ring.index(stage)
                k_r = r_ring.index(stage)
                if (t + 1) * N > seqlen:
                    _zero_rows(c, seqlen - t * N, N)
                    _zero_rows(k_r, seqlen - t * N, N)
                    fence_async_shared()
                if FP8:
                    scale = s_ring.index(stage).reshape([N])
                    _widen(c, scale, wide_ring.index(w), seqlen - t * N, N)
                    c = wide_ring.index(w)
                    fence_async_shared()
                s = gl.zeros([M, N], gl.float32, S_LAYOUT)
                s = warpgroup_mma(q_op, c.permute((1, 0)), s, use_acc=False, is_async=True)
                s = warpgroup_mma(qr_op, k_r.permute((1, 0)), s, is_async=True)
                s = warpgroup_mma_wait(0, deps=[s])
                if t >= full_end:
                    seen = (t * N + col_s)[None, :] <= last_seen[:, None]
                    s = gl.where(seen, s, float("-inf"))
                m_new = gl.maximum(m_i, gl.max(s, 1) * scale_log2)
                p = gl.exp2(s * scale_log2 - m_new[:, None])
                alpha = gl.exp2(m_i - m_new)
                l_own = l_own * gl.convert_layout(alpha, L_ROW)[:, None, None] + _own_sums(p, S_N)
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
            l_i = gl.convert_layout(gl.sum(gl.sum(l_own, 2), 1), S_ROW)
            if w > 0:
                if w > 1:
                    mbarrier.wait(x_empty.index(w - 2), segment & 1)
                x_acc.store(acc)
                x_m.store(m_i)
                x_l.store(l_i)
                mbarrier.arrive(x_full.index(w - 1), count=1)
            else:
                gl.inline_asm_elementwise(
                    "griddepcontrol.launch_dependents; // dummy $0",
                    "=r", [], dtype=gl.int32, is_pure=False, pack=1,
                )  # fmt: skip
                for o in gl.static_range(W - 1):
                    mbarrier.wait(x_full.index(o), segment & 1)
                    m_o = x_m.load(S_ROW)
                    l_o = x_l.load(S_ROW)
                    acc, m_i, l_i = _merge(acc, m_i, l_i, m_o, l_o, x_acc.load(O_LAYOUT), O_ROW)
                    mbarrier.arrive(x_empty.index(o), count=1)
                inv = gl.where(l_i > 0, 1.0 / l_i, 0.0)
                acc = acc * gl.convert_layout(inv, O_ROW)[:, None]
                lse = m_i + gl.log2(l_i)  # -inf for a row that saw nothing
                if take == tiles:
                    first = b64 * Q_LEN * LATENTS * HEADS
                    out_s = (row_s // HEADS * LATENTS + latent) * HEADS + row_s % HEADS
                    gl.store(lse_ptr + first + out_s, lse * 0.6931471805599453, mask=row_s < ROWS)
                    out_o = (row_o // HEADS * LATENTS + latent) * HEADS + row_o % HEADS
                    out_ptrs = out_ptr + first * D + (out_o * D)[:, None] + col_o[None, :]
                    gl.store(
                        out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(row_o < ROWS)[:, None]
                    )
                else:
                    first = ((program + b64) * LATENTS + latent) * ROWS
                    gl.store(part_lse_ptr + first + row_s, lse, mask=row_s < ROWS)
                    part_ptrs = part_out_ptr + first * D + (row_o * D)[:, None] + col_o[None, :]
                    gl.store(part_ptrs, acc, mask=(row_o < ROWS)[:, None])
            loaded += held
            segment += 1
        left -= take
        b += 1
        tile = 0
        if left > 0:
            seqlen = gl.load(seqlens_ptr + b, eviction_policy="evict_last")
