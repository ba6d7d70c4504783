"""Gluon kernel of latent decoding for Hopper: one warp fills a ring, warpgroups consume it.

Letters: b sequences, q query tokens per sequence, L latent heads, G head groups, j heads per latent
head, M query rows per program (rows = q * j, padded), N cached tokens per tile, D latent dim,
R RoPE dim, P programs, W consumers (of one or more warpgroups each), which take the tiles in turn
and merge their states at the end.

Work split, tensor layouts and results are those of `decode_kernel.py`. The kernel needs
page_size % N == 0 and pages that follow each other in memory. A tile `c [N, D]` is loaded once: it
is the key (with the RoPE key `k_r [N, R]`) and the value. Scores are kept in base 2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from mlra_kernels.gluon_names import async_load
from mlra_kernels.latent_decode.hopper_consumer import consume


@gluon.jit
def _next_slot(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wrap = stage == STAGES
    return gl.where(wrap, 0, stage), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def _produce(
    args, N: gl.constexpr, D: gl.constexpr, LATENTS: gl.constexpr,
    PAGE: gl.constexpr, FP8: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load every tile of the program's range into the ring, in order."""
    (
        c_desc, r_desc, s_desc, table_ptr, seqlens_ptr, b, tile, left, seqlen, c_ring, r_ring,
        s_ring, full, empty, latent, stride_tb, max_tiles,
    ) = args  # fmt: skip
    S_BYTES: gl.constexpr = s_desc.block_type.nbytes if FP8 else 0
    BYTES: gl.constexpr = c_desc.block_type.nbytes + r_desc.block_type.nbytes + S_BYTES
    stage = 0
    phase = 1
    while left > 0:
        take = gl.minimum(left, gl.cdiv(seqlen, N) - tile)
        seq_table = table_ptr + b.to(gl.int64) * stride_tb
        for t in range(tile, gl.minimum(tile + take, max_tiles)):
            # The copy engine reads a page outside the cache as zeros.
            page = gl.load(seq_table + t * N // PAGE, eviction_policy="evict_last")
            row = page * PAGE + t * N % PAGE
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), BYTES)
            async_load(c_desc, [row, latent * D], full.index(stage), c_ring.index(stage))
            async_load(r_desc, [row, 0], full.index(stage), r_ring.index(stage))
            if FP8:
                async_load(
                    s_desc,
                    [page * LATENTS + latent, t * N % PAGE],
                    full.index(stage),
                    s_ring.index(stage),
                )
            stage, phase = _next_slot(stage, phase, STAGES)
        left -= take
        b += 1
        tile = 0
        if left > 0:
            seqlen = gl.load(seqlens_ptr + b, eviction_policy="evict_last")


@gluon.jit
def latent_decode_hopper_kernel(
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
    WARPS_N: gl.constexpr,
    W: gl.constexpr,
    CONSUMER_REGS: gl.constexpr,
):
    # FP8 latents are scaled and multiplied as fp16; their RoPE keys are bf16.
    DTYPE: gl.constexpr = gl.float16 if FP8 else q_ptr.dtype.element_ty
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D], DTYPE)
    qr_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, R], r_desc.dtype)
    q_smem = gl.allocate_shared_memory(DTYPE, [M, D], q_layout)
    qr_smem = gl.allocate_shared_memory(r_desc.dtype, [M, R], qr_layout)
    p_smem = q_smem
    if WARPS_N > 1:
        p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, N], DTYPE)
        p_smem = gl.allocate_shared_memory(DTYPE, [M, N], p_layout)
    c_ring = gl.allocate_shared_memory(c_desc.dtype, [STAGES, N, D], c_desc.layout)
    r_ring = gl.allocate_shared_memory(r_desc.dtype, [STAGES, N, R], r_desc.layout)
    wide_ring = q_smem
    s_ring = q_smem
    if FP8:
        c_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, D], DTYPE)
        wide_ring = gl.allocate_shared_memory(DTYPE, [W, N, D], c_layout)
        s_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, N], s_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [W, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [W, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    x_acc = q_smem
    x_m = q_smem
    x_l = q_smem
    if W > 1:  # memory in which consumers 1.. hand their states to consumer 0
        x_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
        row_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        x_acc = gl.allocate_shared_memory(gl.float32, [M, D], x_layout)
        x_m = gl.allocate_shared_memory(gl.float32, [M], row_layout)
        x_l = gl.allocate_shared_memory(gl.float32, [M], row_layout)
        mbarrier.init(q_full, count=1)
        for i in gl.static_range(W - 1):
            mbarrier.init(x_full.index(i), count=1)
            mbarrier.init(x_empty.index(i), count=1)
    fence_async_shared()
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    latent = gl.program_id(0) % LATENTS
    row0 = gl.program_id(0) // LATENTS * M
    program = gl.program_id(1)
    b = gl.load(schedule_ptr + program * 4, eviction_policy="evict_last")
    tile = gl.load(schedule_ptr + program * 4 + 1, eviction_policy="evict_last")
    left = gl.load(schedule_ptr + program * 4 + 2, eviction_policy="evict_last")
    seqlen = gl.load(schedule_ptr + program * 4 + 3, eviction_policy="evict_last")
    run = (
        q_ptr, q_rope_ptr, seqlens_ptr, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr,
        b, tile, left, seqlen, program, latent, row0, q_smem, qr_smem, p_smem, wide_ring,
        c_ring, r_ring, s_ring, x_acc, x_m, x_l, full, empty, q_full, x_full, x_empty, scale_log2,
        stride_qb, stride_qq, stride_ql, stride_qj, stride_qrb, stride_qrq, stride_qrh,
        max_tiles,
    )  # fmt: skip
    fill = (
        c_desc, r_desc, s_desc, table_ptr, seqlens_ptr, b, tile, left, seqlen, c_ring, r_ring,
        s_ring, full, empty, latent, stride_tb, max_tiles,
    )  # fmt: skip
    if W == 1:
        gl.warp_specialize([
            (consume, (run, Q_LEN, HEADS, LATENTS, GROUPS, M, N, D, R, FP8, STAGES, WARPS_N, W,
                        0)),
            (_produce, (fill, N, D, LATENTS, PAGE, FP8, STAGES)),
        ], [1], [24])  # fmt: skip
    elif W == 2:
        gl.warp_specialize([
            (consume, (run, Q_LEN, HEADS, LATENTS, GROUPS, M, N, D, R, FP8, STAGES, WARPS_N, W,
                        0)),
            (consume, (run, Q_LEN, HEADS, LATENTS, GROUPS, M, N, D, R, FP8, STAGES, WARPS_N, W,
                        1)),
            (_produce, (fill, N, D, LATENTS, PAGE, FP8, STAGES)),
        ], [4, 1], [CONSUMER_REGS, 24])  # fmt: skip
    else:
        gl.static_assert(W == 3)
        gl.warp_specialize([
            (consume, (run, Q_LEN, HEADS, LATENTS, GROUPS, M, N, D, R, FP8, STAGES, WARPS_N, W,
                        0)),
            (consume, (run, Q_LEN, HEADS, LATENTS, GROUPS, M, N, D, R, FP8, STAGES, WARPS_N, W,
                        1)),
            (consume, (run, Q_LEN, HEADS, LATENTS, GROUPS, M, N, D, R, FP8, STAGES, WARPS_N, W,
                        2)),
            (_produce, (fill, N, D, LATENTS, PAGE, FP8, STAGES)),
        ], [4, 4, 1], [CONSUMER_REGS, CONSUMER_REGS, 24])  # fmt: skip
