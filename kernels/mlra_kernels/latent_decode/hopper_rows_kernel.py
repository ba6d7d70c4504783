"""Gluon kernel of latent decoding for Hopper with many query rows: consumers share every tile.

Letters: b sequences, q query tokens per sequence, L latent heads, G head groups, j heads per latent
head, W consumers (warpgroups), M query rows per consumer, N cached tokens per tile, D latent dim,
R RoPE dim, P programs.

`hopper_kernel.py` gives a program M query rows, and its consumers take the tiles in turn. Here a
program has W * M rows, and each consumer owns M of them and multiplies every tile, so one load of a
tile serves W * M rows. A ring slot is free once all consumers have used it. Nothing is merged
within a program. Work split, tensor layouts and results are those of `decode_kernel.py`.

What must be done to a tile once is done once: consumer 0 zeroes the rows behind a sequence's last
token for the others, and a warpgroup of its own widens FP8 tiles.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mlra_kernels.latent_decode.configs import LOAD_REGISTERS, WIDEN_REGISTERS
from mlra_kernels.latent_decode.hopper_tiles import (
    FP16_MAX,
    NEVER_SEEN,
    WIDE_SLOTS,
    await_tile,
    free_tile,
    layout_of,
    next_slot,
    own_sums,
    produce,
    tile_in,
    widen_tiles,
)

WIDEN_REGS = gl.constexpr(WIDEN_REGISTERS)
LOAD_REGS = gl.constexpr(LOAD_REGISTERS)


@gluon.jit
def _start_scores(
    q, q_rope, rings, stage, slot, M: gl.constexpr, N: gl.constexpr, S_LAYOUT: gl.constexpr,
    FP8: gl.constexpr,
):  # fmt: skip
    """Start the products of the scores `[M, N]` of a tile."""
    k_r = rings[1].index(stage)
    s = gl.zeros([M, N], gl.float32, S_LAYOUT)
    c = tile_in(rings, stage, slot, FP8)
    s = warpgroup_mma(q, c.permute((1, 0)), s, use_acc=False, is_async=True)
    return warpgroup_mma(q_rope, k_r.permute((1, 0)), s, is_async=True)


@gluon.jit
def _softmax(s, m_i, l_own, acc, t, places, scale_log2, N: gl.constexpr, DTYPE: gl.constexpr):
    """One step of the online softmax: the probabilities of tile t as an operand, and the state."""
    full_end, last_seen, col = places
    O_LAYOUT: gl.constexpr = layout_of(acc)
    L_ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout_of(l_own)))
    if t >= full_end:
        s = gl.where((t * N + col)[None, :] <= last_seen[:, None], s, float("-inf"))
    m_new = gl.maximum(m_i, gl.max(s, 1) * scale_log2)
    p = gl.exp2(s * scale_log2 - m_new[:, None])
    alpha = gl.exp2(m_i - m_new)
    l_own = l_own * gl.convert_layout(alpha, L_ROW)[:, None, None] + own_sums(p, N)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
    p = gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, O_LAYOUT, 2))
    return p, m_new, l_own, acc


@gluon.jit
def _consume_rows(
    args, rings, Q_LEN: gl.constexpr, HEADS: gl.constexpr, LATENTS: gl.constexpr,
    GROUPS: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, R: gl.constexpr,
    FP8: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr, Q_REGS: gl.constexpr,
    w: gl.constexpr,
):  # fmt: skip
    """Consumer w: online softmax of rows w * M to (w + 1) * M of the program over every tile.

    With OVERLAP the scores of the next tile are computed beside the softmax of this one.
    """
    (
        q_ptr, q_rope_ptr, seqlens_ptr, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr,
        b, tile, left, seqlen, program, latent, row0, q_rows, qr_rows, scale_log2,
        stride_qb, stride_qq, stride_ql, stride_qj, stride_qrb, stride_qrq, stride_qrh, max_tiles,
    ) = args  # fmt: skip
    ROWS: gl.constexpr = Q_LEN * HEADS
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    Q_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    q_smem = q_rows.index(w)
    qr_smem = qr_rows.index(w)
    DTYPE: gl.constexpr = q_smem.dtype
    row0 += w * M
    row_q = row0 + gl.arange(0, M, gl.SliceLayout(1, Q_LAYOUT))
    token_q, j_q = row_q // HEADS, row_q % HEADS
    q_off = token_q * stride_qq + latent * stride_ql + j_q * stride_qj
    qr_off = token_q * stride_qrq + (latent % GROUPS * HEADS + j_q) * stride_qrh
    col_q = gl.arange(0, D, gl.SliceLayout(0, Q_LAYOUT))
    col_qr = gl.arange(0, R, gl.SliceLayout(0, Q_LAYOUT))
    mask_q = (row_q < ROWS)[:, None]
    row_s = row0 + gl.arange(0, M, S_ROW)
    row_o = row0 + gl.arange(0, M, O_ROW)
    col_o = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
    col_s = gl.arange(0, N, gl.SliceLayout(0, S_LAYOUT))
    stage = 0
    phase = 0
    slot = 0  # of the ring of widened tiles, FP8 only
    slot_phase = 0
    tails = 0  # bit i: parity of the last tiles seen in slot i
    while left > 0:
        tiles = gl.cdiv(seqlen, N)
        take = gl.minimum(left, tiles - tile)
        if take > 0:
            b64 = gl.cast(b, gl.int64)
            q_ptrs = q_ptr + b64 * stride_qb + q_off[:, None] + col_q[None, :]
            q = gl.load(q_ptrs, mask=mask_q, other=0.0)
            if FP8 and q.dtype != gl.float16:
                q = gl.maximum(gl.minimum(q.to(gl.float32), FP16_MAX), -FP16_MAX)
            q_smem.store(q.to(DTYPE))
            qr_ptrs = q_rope_ptr + b64 * stride_qrb + qr_off[:, None] + col_qr[None, :]
            qr_smem.store(gl.load(qr_ptrs, mask=mask_q, other=0.0).to(qr_smem.dtype))
            fence_async_shared()
            gl.thread_barrier()
            q_op = q_smem
            qr_op = qr_smem
            if Q_REGS:
                q_op = q_smem.load(gl.DotOperandLayout(0, S_LAYOUT, 2))
                qr_op = qr_smem.load(gl.DotOperandLayout(0, S_LAYOUT, 2))
            m_i = gl.full([M], NEVER_SEEN, gl.float32, S_ROW)
            l_own = own_sums(gl.zeros([M, N], gl.float32, S_LAYOUT), N)
            acc = gl.zeros([M, D], gl.float32, O_LAYOUT)
            # Every row sees all tokens of the tiles before `full_end`.
            full_end = gl.maximum(seqlen - Q_LEN + 1, 0) // N
            places = (full_end, seqlen - Q_LEN + row_s // HEADS, col_s)
            end = gl.minimum(tile + take, max_tiles)
            if OVERLAP and tile < end:
                tails = await_tile(
                    rings, stage, phase, slot, slot_phase, tails, seqlen - tile * N, N, D, R, FP8, w
                )
                s = _start_scores(q_op, qr_op, rings, stage, slot, M, N, S_LAYOUT, FP8)
                s = warpgroup_mma_wait(0, deps=[s])
                for t in range(tile + 1, end):
                    before = stage
                    slot_before = slot
                    stage, phase = next_slot(stage, phase, STAGES)
                    slot, slot_phase = next_slot(slot, slot_phase, WIDE_SLOTS)
                    tails = await_tile(
                        rings, stage, phase, slot, slot_phase, tails, seqlen - t * N, N, D, R, FP8,
                        w,
                    )  # fmt: skip
                    s_t = _start_scores(q_op, qr_op, rings, stage, slot, M, N, S_LAYOUT, FP8)
                    p, m_i, l_own, acc = _softmax(
                        s, m_i, l_own, acc, t - 1, places, scale_log2, N, DTYPE
                    )
                    acc = warpgroup_mma(
                        p, tile_in(rings, before, slot_before, FP8), acc, is_async=True
                    )
                    s, acc = warpgroup_mma_wait(0, deps=[s_t, acc])
                    free_tile(rings, before, slot_before, FP8)
                p, m_i, l_own, acc = _softmax(
                    s, m_i, l_own, acc, end - 1, places, scale_log2, N, DTYPE
                )
                acc = warpgroup_mma(p, tile_in(rings, stage, slot, FP8), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                free_tile(rings, stage, slot, FP8)
                stage, phase = next_slot(stage, phase, STAGES)
                slot, slot_phase = next_slot(slot, slot_phase, WIDE_SLOTS)
            elif not OVERLAP:
                for t in range(tile, end):
                    tails = await_tile(
                        rings, stage, phase, slot, slot_phase, tails, seqlen - t * N, N, D, R, FP8,
                        w,
                    )  # fmt: skip
                    s = _start_scores(q_op, qr_op, rings, stage, slot, M, N, S_LAYOUT, FP8)
                    s = warpgroup_mma_wait(0, deps=[s])
                    p, m_i, l_own, acc = _softmax(
                        s, m_i, l_own, acc, t, places, scale_log2, N, DTYPE
                    )
                    acc = warpgroup_mma(p, tile_in(rings, stage, slot, FP8), acc, is_async=True)
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    free_tile(rings, stage, slot, FP8)
                    stage, phase = next_slot(stage, phase, STAGES)
                    slot, slot_phase = next_slot(slot, slot_phase, WIDE_SLOTS)
            if w == 0:
                gl.inline_asm_elementwise(
                    "griddepcontrol.launch_dependents; // dummy $0",
                    "=r", [], dtype=gl.int32, is_pure=False, pack=1,
                )  # fmt: skip
            l_i = gl.convert_layout(gl.sum(gl.sum(l_own, 2), 1), S_ROW)
            inv = gl.where(l_i > 0, 1.0 / l_i, 0.0)
            acc = acc * gl.convert_layout(inv, O_ROW)[:, None]
            lse = m_i + gl.log2(l_i)  # -inf for a row that saw nothing
            if take == tiles:
                first = b64 * Q_LEN * LATENTS * HEADS
                out_s = (row_s // HEADS * LATENTS + latent) * HEADS + row_s % HEADS
                gl.store(lse_ptr + first + out_s, lse * 0.6931471805599453, mask=row_s < ROWS)
                out_o = (row_o // HEADS * LATENTS + latent) * HEADS + row_o % HEADS
                out_ptrs = out_ptr + first * D + (out_o * D)[:, None] + col_o[None, :]
                gl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(row_o < ROWS)[:, None])
            else:
                first = ((program + b64) * LATENTS + latent) * ROWS
                gl.store(part_lse_ptr + first + row_s, lse, mask=row_s < ROWS)
                part_ptrs = part_out_ptr + first * D + (row_o * D)[:, None] + col_o[None, :]
                gl.store(part_ptrs, acc, mask=(row_o < ROWS)[:, None])
        left -= take
        b += 1
        tile = 0
        if left > 0:
            seqlen = gl.load(seqlens_ptr + b, eviction_policy="evict_last")


@gluon.jit
def latent_decode_hopper_rows_kernel(
    q_ptr,  # [b, q, L, j, D]
    q_rope_ptr,  # [b, q, G * j, R]
    c_desc,  # tiles [N, D] of the latents as [pages * PAGE, L * D]
    r_desc,  # tiles [N, R] of the RoPE keys as [pages * PAGE, R]
    s_desc,  # FP8 only: scales [1, N] of [pages * L, PAGE] fp32
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
    stride_tb,
    max_tiles,  # tiles per sequence that the block table can hold
    Q_LEN: gl.constexpr,
    HEADS: gl.constexpr,
    LATENTS: gl.constexpr,
    GROUPS: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    D: gl.constexpr,
    R: gl.constexpr,
    PAGE: gl.constexpr,
    FP8: gl.constexpr,
    STAGES: gl.constexpr,
    W: gl.constexpr,
    CONSUMER_REGS: gl.constexpr,
    OVERLAP: gl.constexpr,
    Q_REGS: gl.constexpr,
):
    # FP8 latents are scaled and multiplied as fp16; their RoPE keys are bf16.
    DTYPE: gl.constexpr = gl.float16 if FP8 else q_ptr.dtype.element_ty
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D], DTYPE)
    qr_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, R], r_desc.dtype)
    q_rows = gl.allocate_shared_memory(DTYPE, [W, M, D], q_layout)
    qr_rows = gl.allocate_shared_memory(r_desc.dtype, [W, M, R], qr_layout)
    c_ring = gl.allocate_shared_memory(c_desc.dtype, [STAGES, N, D], c_desc.layout)
    r_ring = gl.allocate_shared_memory(r_desc.dtype, [STAGES, N, R], r_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    zeroed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=W)
        mbarrier.init(zeroed.index(i), count=1)
    wide_ring = q_rows
    s_ring = q_rows
    wide_full = full
    wide_empty = empty
    if FP8:
        c_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, D], DTYPE)
        wide_ring = gl.allocate_shared_memory(DTYPE, [WIDE_SLOTS, N, D], c_layout)
        s_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, N], s_desc.layout)
        wide_full = gl.allocate_shared_memory(gl.int64, [WIDE_SLOTS, 1], mbarrier.MBarrierLayout())
        wide_empty = gl.allocate_shared_memory(gl.int64, [WIDE_SLOTS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(WIDE_SLOTS):
            mbarrier.init(wide_full.index(i), count=1)
            mbarrier.init(wide_empty.index(i), count=W)
    fence_async_shared()
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    latent = gl.program_id(0) % LATENTS
    row0 = gl.program_id(0) // LATENTS * (W * M)
    program = gl.program_id(1)
    b = gl.load(schedule_ptr + program * 4, eviction_policy="evict_last")
    tile = gl.load(schedule_ptr + program * 4 + 1, eviction_policy="evict_last")
    left = gl.load(schedule_ptr + program * 4 + 2, eviction_policy="evict_last")
    seqlen = gl.load(schedule_ptr + program * 4 + 3, eviction_policy="evict_last")
    run = (
        q_ptr, q_rope_ptr, seqlens_ptr, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr,
        b, tile, left, seqlen, program, latent, row0, q_rows, qr_rows, scale_log2,
        stride_qb, stride_qq, stride_ql, stride_qj, stride_qrb, stride_qrq, stride_qrh, max_tiles,
    )  # fmt: skip
    rings = (c_ring, r_ring, wide_ring, full, empty, wide_full, wide_empty, zeroed)
    fill = (
        c_desc, r_desc, s_desc, table_ptr, seqlens_ptr, b, tile, left, seqlen, c_ring, r_ring,
        s_ring, full, empty, latent, stride_tb, max_tiles,
    )  # fmt: skip
    widen = (seqlens_ptr, b, tile, left, seqlen, s_ring, max_tiles)
    if W == 2 and FP8:
        gl.warp_specialize([
            (_consume_rows, (run, rings, Q_LEN, HEADS, LATENTS, GROUPS, M, N, D, R, FP8, STAGES,
                             OVERLAP, Q_REGS, 0)),
            (_consume_rows, (run, rings, Q_LEN, HEADS, LATENTS, GROUPS, M, N, D, R, FP8, STAGES,
                             OVERLAP, Q_REGS, 1)),
            (widen_tiles, (widen, rings, N, D, R, STAGES)),
            (produce, (fill, N, D, LATENTS, PAGE, FP8, STAGES)),
        ], [4, 4, 1], [CONSUMER_REGS, WIDEN_REGS, LOAD_REGS])  # fmt: skip
    elif W == 2:
        gl.warp_specialize([
            (_consume_rows, (run, rings, Q_LEN, HEADS, LATENTS, GROUPS, M, N, D, R, FP8, STAGES,
                             OVERLAP, Q_REGS, 0)),
            (_consume_rows, (run, rings, Q_LEN, HEADS, LATENTS, GROUPS, M, N, D, R, FP8, STAGES,
                             OVERLAP, Q_REGS, 1)),
            (produce, (fill, N, D, LATENTS, PAGE, FP8, STAGES)),
        ], [4, 1], [CONSUMER_REGS, LOAD_REGS])  # fmt: skip
    else:
        gl.static_assert(W == 3 and not FP8)
        gl.warp_specialize([
            (_consume_rows, (run, rings, Q_LEN, HEADS, LATENTS, GROUPS, M, N, D, R, FP8, STAGES,
                             OVERLAP, Q_REGS, 0)),
            (_consume_rows, (run, rings, Q_LEN, HEADS, LATENTS, GROUPS, M, N, D, R, FP8, STAGES,
                             OVERLAP, Q_REGS, 1)),
            (_consume_rows, (run, rings, Q_LEN, HEADS, LATENTS, GROUPS, M, N, D, R, FP8, STAGES,
                             OVERLAP, Q_REGS, 2)),
            (produce, (fill, N, D, LATENTS, PAGE, FP8, STAGES)),
        ], [4, 4, 1], [CONSUMER_REGS, CONSUMER_REGS, LOAD_REGS])  # fmt: skip
