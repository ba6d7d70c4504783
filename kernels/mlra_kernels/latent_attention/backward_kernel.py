"""Backward of the absorbed core: a program holds its queries and goes through the latents.

Letters as in forward_kernel.py. In the equations P is the matrix of probabilities. With
P = exp(scale S - lse), S = q [c | r]^T, dP = dO c^T:

    dS = scale P (dP - delta),  delta = rowsum(dO * O)
    dq = dS [c | r],  dc = P^T dO + dS^T q_nope,  dr = dS^T q_rope

c is key and value, so one accumulator sums both gradients of c. A program keeps dq of its queries
in registers and adds dc and dr of every tile to float32 sums in memory. These sums, L + R numbers
per key and key head, stay in the L2 cache; sums of dq would be as many for every (branch, head)
pair.
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

from mlra_kernels.gluon_names import async_atomic_add, async_load, async_store, barrier
from mlra_kernels.latent_attention.tiles import (
    MASKED,
    keys_read_by_all,
    load_keys,
    mask,
    mask_diagonal,
    opaque,
    pass_tiles,
    place_program,
    place_tile,
    store_rows,
    tiles_of_half,
    tiles_read,
)

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def row_products(
    a_ptr, b_ptr, out_ptr, s, b,
    P: gl.constexpr, L: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """Sum of a * b over the last dim, both `[s, b, P, L]` -> `[b, P, s]` float32.

    Programs: (tokens in blocks of T, pair, sequence).
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    pair, seq = gl.program_id(1), gl.program_id(2)
    rows = gl.program_id(0) * T + gl.arange(0, T, gl.SliceLayout(1, layout))
    columns = gl.arange(0, L, gl.SliceLayout(0, layout))
    live = (rows < s)[:, None] & (columns < L)[None, :]
    at = ((rows.to(gl.int64) * b + seq) * P + pair)[:, None] * L + columns[None, :]
    x = gl.load(a_ptr + at, live, 0.0).to(gl.float32)
    y = gl.load(b_ptr + at, live, 0.0).to(gl.float32)
    gl.store(out_ptr + (seq * P + pair) * s + rows, gl.sum(x * y, 1), rows < s)


@gluon.jit
def latent_attention_backward(
    q_nope_desc, q_rope_desc, key_nope_desc, key_rope_desc, do_desc, dq_nope_desc, dq_rope_desc,
    dkey_nope_desc, dkey_rope_desc, dq_ptr, lse_ptr, delta_ptr, ranges_ptr, tiles_ptr,
    s, t, past, scale, log2_scale,
    P: gl.constexpr, G: gl.constexpr, L: gl.constexpr, R: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, RANGES: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """q, dq `[s, b, P, L + R]`; key `[t, b, G, L + R]`; dO `[s, b, P, L]`. In float32: lse, delta
    `[b, P, s]` and dkey `[t, b, G, L + R]`, to which the kernel adds. The forward says which keys a
    query reads and which queries a program takes.

    Blocks of the descriptors: M / 2 queries, N keys. Programs: (query tile, the last first; pair;
    sequence), of 4 warps and the warps of the partitions. Two warpgroups compute P, dS and dq, each
    for half of the queries. A third warpgroup computes dc and dr. One warp loads tiles of keys, and
    one warp adds dc and dr to memory.
    """
    dtype: gl.constexpr = do_desc.dtype
    m: gl.constexpr = M // 2
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([m, N], dtype)
    q_nope = gl.allocate_shared_memory(dtype, [2, m, L], q_nope_desc.layout)
    q_rope = gl.allocate_shared_memory(dtype, [2, m, R], q_rope_desc.layout)
    do = gl.allocate_shared_memory(dtype, [2, m, L], do_desc.layout)
    c_ring = gl.allocate_shared_memory(dtype, [2, N, L], key_nope_desc.layout)
    r_ring = gl.allocate_shared_memory(dtype, [2, N, R], key_rope_desc.layout)
    p_tiles = gl.allocate_shared_memory(dtype, [2, m, N], square)
    ds_tiles = gl.allocate_shared_memory(dtype, [2, m, N], square)
    dc_tile = gl.allocate_shared_memory(gl.float32, [1, N, L], dkey_nope_desc.layout)
    dr_tile = gl.allocate_shared_memory(gl.float32, [1, N, R], dkey_rope_desc.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    summed = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    added = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(loaded.index(i), count=1)
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
    mbarrier.init(summed.index(0), count=1)
    mbarrier.init(added.index(0), count=1)
    fence_async_shared()  # so that the copy engine sees the barriers

    UNIT: gl.constexpr = 1 if TILES else N  # keys per count of `first`
    if TILES:
        head, place, q_column, k_column = place_tile(tiles_ptr, s, t, P, G, L + R, M)
        start, end, first, stop = place
        reading = (ranges_ptr, end, stop, stop - end)
        tiles_0 = tiles_of_half(start, first, reading, m, N)
        tiles_1 = tiles_of_half(start + m, first, reading, m, N)
        tiles = gl.maximum(tiles_0, tiles_1)
    else:
        head, start, q_column, k_column = place_program(P, G, L + R, M)
        reading = (ranges_ptr, s, t, past)
        first, tiles = tiles_read(start, M, reading, N, RANGES)
        tiles_1 = tiles
        if RANGES:
            tiles_0 = tiles  # a stage needs both halves to free it: both take all tiles
        else:
            _, tiles_0 = tiles_read(start, m, reading, N, RANGES)  # may be one tile fewer
    queries, keys = (q_nope, q_rope, do, loaded), (c_ring, r_ring, full, free)
    scores, sums = (p_tiles, ds_tiles, ready, taken), (dc_tile, dr_tile, summed, added)
    rows = (lse_ptr, delta_ptr, head, start, s, scale, log2_scale)
    read_0, read_1 = (reading, first, tiles_0, tiles), (reading, first, tiles_1, tiles)
    dq = (dq_nope_desc, dq_rope_desc, dq_ptr, q_column)
    inputs = (q_nope_desc, q_rope_desc, do_desc, key_nope_desc, key_rope_desc)
    dkey = (dkey_nope_desc, dkey_rope_desc, k_column)
    columns = (q_column, head * L, k_column)
    shared = (queries, keys, scores, rows, dq)
    gl.warp_specialize(
        [
            (_attend, (0, shared, read_0, L, R, m, N, P, RANGES, TILES, UNIT)),
            (_attend, (1, shared, read_1, L, R, m, N, P, RANGES, TILES, UNIT)),
            (_sum, (queries, scores, sums, tiles_0, tiles_1, L, R, N, TILES)),
            (_load, (queries, keys, inputs, start, columns, first, tiles, L, m, N, UNIT)),
            (_add, (sums, dkey, first, tiles, L, N, UNIT)),
        ],
        [4, 4, 1, 1],
        [192, 104, 24, 24],
    )


@gluon.jit
def _load(
    queries, keys, descs, start, columns, first, tiles,
    L: gl.constexpr, m: gl.constexpr, N: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """One warp: loads queries and dO, then keys into the stages that both halves have freed."""
    q_nope, q_rope, do, loaded = queries
    q_nope_desc, q_rope_desc, do_desc, key_nope_desc, key_rope_desc = descs
    q_column, do_column, k_column = columns
    size: gl.constexpr = q_nope_desc.block_type.nbytes + q_rope_desc.block_type.nbytes
    for half in gl.static_range(2):
        row, bar = start + half * m, loaded.index(half)
        mbarrier.expect(bar, size + do_desc.block_type.nbytes)
        async_load(q_nope_desc, [row, q_column], bar, q_nope.index(half))
        async_load(q_rope_desc, [row, q_column + L], bar, q_rope.index(half))
        async_load(do_desc, [row, do_column], bar, do.index(half))
    load_keys(key_nope_desc, key_rope_desc, keys, k_column, first * UNIT, N, tiles, L, 2)


@gluon.jit
def _attend(
    half: gl.constexpr, shared, read,
    L: gl.constexpr, R: gl.constexpr, m: gl.constexpr, N: gl.constexpr, P: gl.constexpr,
    RANGES: gl.constexpr, TILES: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """One warpgroup: P, dS and dq of half of the queries."""
    queries, keys, scores, rows, dq = shared
    q_nope_tiles, q_rope_tiles, do_tiles, loaded = queries
    c_ring, r_ring, full, free = keys
    p_tiles, ds_tiles, ready, taken = scores
    lse_ptr, delta_ptr, head, start, s, scale, log2_scale = rows
    reading, first, tiles, passed = read
    dq_nope_desc, dq_rope_desc, dq_ptr, q_column = dq
    dtype: gl.constexpr = dq_nope_desc.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, L, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    start += half * m
    if TILES:
        last = start + reading[3] - first  # last key of query 0, counted from `first`
    else:
        by_all = keys_read_by_all(start, m, reading, RANGES)
    row = start + gl.arange(0, m, gl.SliceLayout(1, layout))
    end = reading[1]
    # Rows of another program get lse = inf, so their weights are exp2(-inf) = 0.
    lse = gl.load(lse_ptr + head * s + row, row < end, -MASKED if TILES else 0.0) * LOG2E
    delta = gl.load(delta_ptr + head * s + row, row < end, 0.0) * scale
    zeros = gl.zeros([m, N], gl.float32, layout)
    dq_nope = gl.zeros([m, L], gl.float32, wide)
    dq_rope = gl.zeros([m, R], gl.float32, narrow)
    mbarrier.wait(loaded.index(half), 0)

    for j in range(tiles):
        stage = j & 1
        # j >> 30 is 0, but the compiler does not know, so it computes addresses in every iteration.
        # Registers cannot hold the addresses of all products beside the accumulators.
        zero = j >> 30
        h = half + zero
        p_tile, ds_tile = p_tiles.index(h), ds_tiles.index(h)
        mbarrier.wait(full.index(stage), (j // 2) & 1)
        c, r = c_ring.index(stage).permute((1, 0)), r_ring.index(stage).permute((1, 0))
        x = warpgroup_mma(q_nope_tiles.index(h), c, zeros, use_acc=False, is_async=True)
        x = warpgroup_mma(q_rope_tiles.index(h), r, x, is_async=True)
        x = warpgroup_mma_wait(0, deps=[x])
        x = x * log2_scale - lse[:, None]
        if TILES:
            x = mask_diagonal(x, j, last, zero, m, N, layout)
        else:
            x = mask(x, first * UNIT + j * N, start + zero, by_all, reading, m, N, layout, RANGES)
        p = opaque(gl.exp2(x).to(dtype))
        dp = warpgroup_mma(do_tiles.index(h), c, zeros, use_acc=False, is_async=True)
        mbarrier.wait(taken.index(half), (j + 1) & 1)
        p_tile.store(p)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = (p.to(gl.float32) * (dp * scale - delta[:, None])).to(dtype)
        operand = gl.convert_layout(ds, left)
        dq_nope = warpgroup_mma(operand, c_ring.index(stage), dq_nope, is_async=True)
        dq_rope = warpgroup_mma(operand, r_ring.index(stage), dq_rope, is_async=True)
        ds_tile.store(ds)
        fence_async_shared()
        barrier()
        mbarrier.arrive(ready.index(half), count=1)
        # `operand` is named here so that its registers are not reused before.
        dq_nope, dq_rope, operand = warpgroup_mma_wait(0, deps=[dq_nope, dq_rope, operand])
        barrier()
        mbarrier.arrive(free.index(stage), count=1)

    if TILES:
        pass_tiles(tiles, passed, full, free, 2)
    mbarrier.wait(taken.index(half), (tiles + 1) & 1)  # the queries' memory may now take dq
    q_nope, q_rope = q_nope_tiles.index(half), q_rope_tiles.index(half)
    q_nope.store(dq_nope.to(dtype))
    q_rope.store(dq_rope.to(dtype))
    fence_async_shared()
    barrier()
    if TILES:
        pitch = gl.num_programs(1) * P * (L + R)
        start += passed >> 30  # 0, see `zero` above
        store_rows(dq_nope_desc, dq_ptr, q_nope, start, end, pitch, q_column, m, L)
        store_rows(dq_rope_desc, dq_ptr, q_rope, start, end, pitch, q_column + L, m, R)
    else:
        async_store(dq_nope_desc, [start, q_column], q_nope)
        async_store(dq_rope_desc, [start, q_column + L], q_rope)
    tma.store_wait(0)


@gluon.jit
def _sum(
    queries, scores, sums, tiles_0, tiles_1,
    L: gl.constexpr, R: gl.constexpr, N: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: dc and dr, tile after tile."""
    mbarrier.wait(queries[3].index(0), 0)
    mbarrier.wait(queries[3].index(1), 0)
    both, tiles, half = tiles_0, tiles_1, 1
    if TILES:
        both, tiles = gl.minimum(tiles_0, tiles_1), gl.maximum(tiles_0, tiles_1)
        if tiles_0 > tiles_1:
            half = 0
    for j in range(both):
        _sum_tile(j, True, 1, queries, scores, sums, L, R, N)
    for j in range(both, tiles):
        _sum_tile(j, False, half, queries, scores, sums, L, R, N)


@gluon.jit
def _sum_tile(
    j, both: gl.constexpr, half, queries, scores, sums,
    L: gl.constexpr, R: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """dc and dr of tile j, from both halves of the queries or, without `both`, from `half`. dc is
    stored before dr needs registers."""
    q_nope, q_rope, do, _ = queries
    p_tiles, ds_tiles, ready, taken = scores
    dc_tile, dr_tile, summed, added = sums
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, L, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])
    zero = j >> 30  # see _attend
    one = half + zero
    dc = gl.zeros([N, L], gl.float32, wide)
    dr = gl.zeros([N, R], gl.float32, narrow)
    if both:
        mbarrier.wait(ready.index(0), j & 1)
        p, ds = p_tiles.index(zero).permute((1, 0)), ds_tiles.index(zero).permute((1, 0))
        dc = warpgroup_mma(p, do.index(zero), dc, use_acc=False, is_async=True)
        dc = warpgroup_mma(ds, q_nope.index(zero), dc, is_async=True)
    mbarrier.wait(ready.index(half), j & 1)
    p, ds = p_tiles.index(one).permute((1, 0)), ds_tiles.index(one).permute((1, 0))
    dc = warpgroup_mma(p, do.index(one), dc, use_acc=both, is_async=True)
    dc = warpgroup_mma(ds, q_nope.index(one), dc, is_async=True)
    dc = warpgroup_mma_wait(0, deps=[dc])
    mbarrier.wait(added.index(0), (j + 1) & 1)
    dc_tile.index(zero).store(dc)

    if both:
        ds_0 = ds_tiles.index(zero).permute((1, 0))
        dr = warpgroup_mma(ds_0, q_rope.index(zero), dr, use_acc=False, is_async=True)
    dr = warpgroup_mma(ds, q_rope.index(one), dr, use_acc=both, is_async=True)
    dr = warpgroup_mma_wait(0, deps=[dr])
    barrier()
    if both:
        mbarrier.arrive(taken.index(0), count=1)
    mbarrier.arrive(taken.index(half), count=1)
    dr_tile.index(zero).store(dr)
    fence_async_shared()
    barrier()
    mbarrier.arrive(summed.index(0), count=1)


@gluon.jit
def _add(sums, dkey, first, tiles, L: gl.constexpr, N: gl.constexpr, UNIT: gl.constexpr):
    """One warp: adds dc and dr of every tile to memory."""
    dc_tile, dr_tile, summed, added = sums
    dkey_nope_desc, dkey_rope_desc, column = dkey
    for j in range(tiles):
        mbarrier.wait(summed.index(0), j & 1)
        row = first * UNIT + j * N
        async_atomic_add(dkey_nope_desc, [row, column], dc_tile.index(0))
        async_atomic_add(dkey_rope_desc, [row, column + L], dr_tile.index(0))
        tma.store_wait(0)
        mbarrier.arrive(added.index(0), count=1)
