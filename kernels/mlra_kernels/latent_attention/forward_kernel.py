"""Forward of the absorbed core: a tile of latents is loaded once, as keys and as values.

Letters: s queries and t keys per sequence, b sequences, P (branch, head) pairs, G key heads,
L latent dim, R RoPE dim. A program takes M queries of a pair and goes through the keys in tiles of
N.
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

from mlra_kernels.gluon_names import async_store, barrier
from mlra_kernels.latent_attention.tiles import (
    MASKED,
    keys_read_by_all,
    load_keys,
    load_rows,
    mask,
    mask_diagonal,
    pass_tiles,
    place_program,
    place_tile,
    store_rows,
    tiles_of_half,
    tiles_read,
)

LN2 = gl.constexpr(0.6931471805599453)


# One build serves every length: a server gets prompts of any length, and a build takes seconds.
@gluon.jit(do_not_specialize=["s", "t", "past"])
def latent_attention_forward(
    q_nope_desc, q_rope_desc, key_nope_desc, key_rope_desc, out_desc, out_ptr, lse_ptr, top_ptr,
    ranges_ptr, tiles_ptr, s, t, past, log2_scale,
    P: gl.constexpr, G: gl.constexpr, L: gl.constexpr, R: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, RANGES: gl.constexpr,
    TILES: gl.constexpr,
):  # fmt: skip
    """q `[s, b, P, L + R]`, key `[t, b, G, L + R]` -> out `[s, b, P, L]`, lse `[b, P, s]`.

    Query i reads the keys up to i + past or, with RANGES, from ranges[0, i] to ranges[1, i]: int32
    `[2, s]`, neither row of which falls. lse is a natural logarithm in float32; log2_scale =
    softmax scale * log2(e). top, if not None, takes each query's largest scaled score, in the shape
    and dtype of lse: a by-product of the softmax. Blocks of the descriptors: M / 2 queries, N keys.

    Programs: (query tile, the last first; pair; sequence) or, with TILES, (row of tiles and pair;
    sequence), where tiles `[n, 4]` int32 says which queries and keys a program takes
    (`query_tiles`). A program has 4 warps and the warps of the partitions. Two warpgroups take half
    of the queries each, so that the softmax of one overlaps the products of the other. One warp
    loads. Tiles of keys are taken from the last to the first.
    """
    dtype: gl.constexpr = out_desc.dtype
    m: gl.constexpr = M // 2
    q_nope = gl.allocate_shared_memory(dtype, [2, m, L], q_nope_desc.layout)
    q_rope = gl.allocate_shared_memory(dtype, [2, m, R], q_rope_desc.layout)
    c_ring = gl.allocate_shared_memory(dtype, [STAGES, N, L], key_nope_desc.layout)
    r_ring = gl.allocate_shared_memory(dtype, [STAGES, N, R], key_rope_desc.layout)
    row_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    anchor = gl.allocate_shared_memory(gl.float32, [2, m], row_layout)
    loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(loaded.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()  # so that the copy engine sees the barriers

    UNIT: gl.constexpr = 1 if TILES else N  # keys per count of `first`
    if TILES:
        head, place, q_column, k_column = place_tile(tiles_ptr, s, t, P, G, L + R, M)
        start, end, first, stop = place
        reading = (ranges_ptr, end, stop, stop - end)
        tiles = gl.cdiv(stop - first, N)
    else:
        head, start, q_column, k_column = place_program(P, G, L + R, M)
        reading = (ranges_ptr, s, t, past)
        first, tiles = tiles_read(start, M, reading, N, RANGES)
    queries, keys = (q_nope, q_rope, loaded), (c_ring, r_ring, full, free)
    rows = (out_ptr, lse_ptr, top_ptr, head, start, s, log2_scale)
    read = (reading, first, tiles)
    descs = (q_nope_desc, q_rope_desc, key_nope_desc, key_rope_desc)
    shared = (queries, keys, anchor, out_desc, rows, read)
    gl.warp_specialize(
        [
            (_attend, (0, shared, L, m, N, P, STAGES, RANGES, TILES, UNIT)),
            (_attend, (1, shared, L, m, N, P, STAGES, RANGES, TILES, UNIT)),
            (_load, (queries, keys, descs, start, q_column, k_column, read, L, m, N, STAGES, UNIT)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _load(
    queries, keys, descs, start, q_column, k_column, read,
    L: gl.constexpr, m: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """One warp: loads the queries, then keys into the stages that both halves have freed."""
    q_nope, q_rope, loaded = queries
    q_nope_desc, q_rope_desc, key_nope_desc, key_rope_desc = descs
    _, first, tiles = read
    for half in gl.static_range(2):
        load_rows(
            q_nope_desc, q_rope_desc, start + half * m, q_column,
            q_nope.index(half), q_rope.index(half), loaded.index(half), L,
        )  # fmt: skip
    last = first * UNIT + (tiles - 1) * N
    load_keys(key_nope_desc, key_rope_desc, keys, k_column, last, -N, tiles, L, STAGES)


@gluon.jit
def _attend(
    half: gl.constexpr, shared,
    L: gl.constexpr, m: gl.constexpr, N: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr,
    RANGES: gl.constexpr, TILES: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """One warpgroup: attention of half of the queries."""
    queries, keys, anchor, out_desc, rows, read = shared
    q_nope_tiles, q_rope_tiles, loaded = queries
    c_ring, r_ring, full, free = keys
    out_ptr, lse_ptr, top_ptr, head, start, s, log2_scale = rows
    reading, first, tiles = read
    dtype: gl.constexpr = out_desc.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, L, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, values, 2)
    of_rows: gl.constexpr = gl.SliceLayout(1, scores)
    start += half * m
    if TILES:
        last = start + reading[3] - first  # last key of query 0, counted from `first`
    else:
        by_all = keys_read_by_all(start, m, reading, RANGES)
        last = first * UNIT + (tiles - 1) * N
    q_nope, q_rope = q_nope_tiles.index(half), q_rope_tiles.index(half)
    zero = gl.zeros([m, N], gl.float32, scores)
    out = gl.zeros([m, L], gl.float32, values)
    top = gl.full([m], MASKED, gl.float32, of_rows)
    total = gl.zeros([m], gl.float32, of_rows)

    begin = 0
    if TILES:  # a half without queries takes one tile, so that its loop needs no other shape
        begin = tiles - gl.maximum(tiles_of_half(start, first, reading, m, N), 1)
        pass_tiles(0, begin, full, free, STAGES)
    mbarrier.wait(loaded.index(half), 0)
    mbarrier.wait(full.index(begin % STAGES), (begin // STAGES) & 1)
    c = c_ring.index(begin % STAGES).permute((1, 0))
    r = r_ring.index(begin % STAGES).permute((1, 0))
    x = warpgroup_mma(q_nope, c, zero, use_acc=False, is_async=True)
    x = warpgroup_mma(q_rope, r, x, is_async=True)
    x = warpgroup_mma_wait(0, deps=[x])
    if TILES:
        x = mask_diagonal(x, tiles - 1 - begin, last, 0, m, N, scores)
    else:
        x = mask(x, last, start, by_all, reading, m, N, scores, RANGES)
    weights, shrink, top, total = _softmax(x, top, total, log2_scale)
    p = gl.convert_layout(weights.to(dtype), operand)
    for j in range(begin + 1, tiles):
        stage, before = j % STAGES, (j - 1) % STAGES
        mbarrier.wait(full.index(stage), (j // STAGES) & 1)
        c, r = c_ring.index(stage).permute((1, 0)), r_ring.index(stage).permute((1, 0))
        x = warpgroup_mma(q_nope, c, zero, use_acc=False, is_async=True)
        x = warpgroup_mma(q_rope, r, x, is_async=True)
        out = warpgroup_mma(p, c_ring.index(before), out, is_async=True)
        # This tile's softmax overlaps the previous tile's product with the values.
        x = warpgroup_mma_wait(1, deps=[x])
        if TILES:
            x = mask_diagonal(x, tiles - 1 - j, last, j >> 30, m, N, scores)
        else:
            x = mask(x, last - j * N, start, by_all, reading, m, N, scores, RANGES)
        weights, shrink, top, total = _softmax(x, top, total, log2_scale)
        # Never read. Without this store, ptxas would move the softmax behind the next wait.
        anchor.index(half).store(total)
        # p is named here so that its registers are not reused before.
        out, p = warpgroup_mma_wait(0, deps=[out, p])
        barrier()
        mbarrier.arrive(free.index(before), count=1)
        out = out * gl.convert_layout(shrink, gl.SliceLayout(1, values))[:, None]
        p = gl.convert_layout(weights.to(dtype), operand)

    out = warpgroup_mma(p, c_ring.index((tiles - 1) % STAGES), out, is_async=True)
    row = start + gl.arange(0, m, of_rows)
    end = reading[1]
    gl.store(lse_ptr + head * s + row, (top + gl.log2(total)) * LN2, row < end)
    if top_ptr is not None:
        gl.store(top_ptr + head * s + row, top * LN2, row < end)
    out = warpgroup_mma_wait(0, deps=[out])
    out = out / gl.convert_layout(total, gl.SliceLayout(1, values))[:, None]
    barrier()  # every warp is done with the queries
    q_nope.store(out.to(dtype))
    fence_async_shared()
    barrier()
    if TILES:
        pitch = gl.num_programs(1) * P * L
        store_rows(out_desc, out_ptr, q_nope, start, end, pitch, head * L, m, L)
    else:
        async_store(out_desc, [start, head * L], q_nope)
    tma.store_wait(0)


@gluon.jit
def _softmax(x, top, total, log2_scale):
    """Online softmax of a tile's scores x.

    Returns: the weights, not yet divided by the total; the factor by which earlier sums shrink; the
    new top score, in base 2; the new total.
    """
    higher = gl.maximum(top, gl.max(x, 1) * log2_scale)
    # A row masked whole so far gets weights exp2(MASKED - 0) = 0, not exp2(-inf + inf) = NaN.
    base = gl.where(higher == MASKED, 0.0, higher)
    weights = gl.exp2(x * log2_scale - base[:, None])
    shrink = gl.exp2(top - base)
    return weights, shrink, higher, total * shrink + gl.sum(weights, 1)
