"""Steps of the Hopper kernels with tiles of the cache: loading, zeroing, widening, waiting.

Letters: L latent heads, M query rows per consumer, N cached tokens per tile, D latent dim, R RoPE
dim.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

FP16_MAX = gl.constexpr(65504.0)
SCALE_MAX = gl.constexpr(146.0)  # times 448, the largest e4m3: just inside fp16
NEVER_SEEN = gl.constexpr(-1.0e30)  # running maximum of a row that has seen no token
WIDE_SLOTS = gl.constexpr(3)  # one that is widened, two that a consumer multiplies


@gluon.jit
def next_slot(stage, phase, STAGES: gl.constexpr):
    """Return the slot after `stage`, and the parity of its next filling."""
    stage += 1
    wrap = stage == STAGES
    return gl.where(wrap, 0, stage), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def produce(
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
        seq_table = table_ptr + gl.cast(b, gl.int64) * stride_tb
        for t in range(tile, gl.minimum(tile + take, max_tiles)):
            # The copy engine reads a page outside the cache as zeros.
            page = gl.load(seq_table + t * N // PAGE, eviction_policy="evict_last")
            row = page * PAGE + t * N % PAGE
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), BYTES)
            tma.async_copy_global_to_shared(
                c_desc, [row, latent * D], full.index(stage), c_ring.index(stage)
            )
            tma.async_copy_global_to_shared(
                r_desc, [row, 0], full.index(stage), r_ring.index(stage)
            )
            if FP8:
                tma.async_copy_global_to_shared(
                    s_desc,
                    [page * LATENTS + latent, t * N % PAGE],
                    full.index(stage),
                    s_ring.index(stage),
                )
            stage, phase = next_slot(stage, phase, STAGES)
        left -= take
        b += 1
        tile = 0
        if left > 0:
            seqlen = gl.load(seqlens_ptr + b, eviction_policy="evict_last")


@gluon.jit
def zero_rows(ring_tile, rows_in, N: gl.constexpr, C: gl.constexpr):
    """Zero the rows of a shared tile `[N, C]` from `rows_in` on: unused cache may hold NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    x = ring_tile.load(LAYOUT)
    n = gl.arange(0, N, gl.SliceLayout(1, LAYOUT))
    ring_tile.store(gl.where((n < rows_in)[:, None], x, 0.0).to(x.dtype))


@gluon.jit
def widen(c, scale, wide, rows_in, N: gl.constexpr, D: gl.constexpr):
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
def own_sums(p, S_N: gl.constexpr):
    """Per-thread partial sums of the rows of a score tile `[M, N]`: `[M, N / S_N, 4]`.

    No thread waits for another; the sum over the threads of a row is taken once per sequence.
    """
    M: gl.constexpr = p.shape[0]
    parts = p.reshape([M, p.shape[1] // S_N, S_N // 8, 4, 2])
    return gl.sum(gl.sum(parts, 4), 2)


@gluon.constexpr_function
def layout_of(x):
    """Return the layout of a tensor."""
    return x.type.layout


@gluon.jit
def widen_tiles(
    args, rings, N: gl.constexpr, D: gl.constexpr, R: gl.constexpr, STAGES: gl.constexpr
):
    """Widen every FP8 tile of the program's range once, for all consumers, in order."""
    seqlens_ptr, b, tile, left, seqlen, s_ring, max_tiles = args
    c_ring, r_ring, wide_ring, full, _, wide_full, wide_empty, _ = rings
    stage = 0
    phase = 0
    slot = 0
    slot_phase = 1
    while left > 0:
        take = gl.minimum(left, gl.cdiv(seqlen, N) - tile)
        for t in range(tile, gl.minimum(tile + take, max_tiles)):
            rows_in = seqlen - t * N
            mbarrier.wait(full.index(stage), phase)
            if rows_in < N:
                zero_rows(c_ring.index(stage), rows_in, N, D)
                zero_rows(r_ring.index(stage), rows_in, N, R)
                fence_async_shared()
                gl.thread_barrier()
            mbarrier.wait(wide_empty.index(slot), slot_phase)
            scale = s_ring.index(stage).reshape([N])
            widen(c_ring.index(stage), scale, wide_ring.index(slot), rows_in, N, D)
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(wide_full.index(slot), count=1)
            stage, phase = next_slot(stage, phase, STAGES)
            slot, slot_phase = next_slot(slot, slot_phase, WIDE_SLOTS)
        left -= take
        b += 1
        tile = 0
        if left > 0:
            seqlen = gl.load(seqlens_ptr + b, eviction_policy="evict_last")


@gluon.jit
def await_tile(
    rings, stage, phase, slot, slot_phase, tails, rows_in, N: gl.constexpr, D: gl.constexpr,
    R: gl.constexpr, FP8: gl.constexpr, w: gl.constexpr,
):  # fmt: skip
    """Wait until a tile can be multiplied; return `tails`, with its slot's bit turned for a tail.

    Consumer 0 zeroes the rows of a sequence's last tile from `rows_in` on: unused cache may hold
    NaN. The others wait for that, slot by slot, as consumer 0 may be several tails ahead. FP8 tiles
    come zeroed.
    """
    c_ring, r_ring, _, full, _, wide_full, _, zeroed = rings
    mbarrier.wait(full.index(stage), phase)
    if FP8:
        mbarrier.wait(wide_full.index(slot), slot_phase)
    elif rows_in < N:
        if w == 0:
            zero_rows(c_ring.index(stage), rows_in, N, D)
            zero_rows(r_ring.index(stage), rows_in, N, R)
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(zeroed.index(stage), count=1)
        else:
            mbarrier.wait(zeroed.index(stage), tails >> stage & 1)
        tails ^= 1 << stage
    return tails


@gluon.jit
def free_tile(rings, stage, slot, FP8: gl.constexpr):
    """Say that this consumer's products have read a tile."""
    _, _, _, _, empty, _, wide_empty, _ = rings
    gl.thread_barrier()
    mbarrier.arrive(empty.index(stage), count=1)
    if FP8:
        mbarrier.arrive(wide_empty.index(slot), count=1)


@gluon.jit
def tile_in(rings, stage, slot, FP8: gl.constexpr):
    """Return the tile `[N, D]` in a slot of the ring; FP8: in a slot of the widened tiles."""
    return rings[2].index(slot) if FP8 else rings[0].index(stage)
