"""Backward of the absorbed core: queries stay, latents pass by.

Letters as in forward_kernel.py. With P = exp(scale S - lse), S = q k^T, dP = dO c^T:

    dS = scale P (dP - delta),  delta = rowsum(dO * O)
    dq = dS [c | r],  dc = P^T dO + dS^T q_nope,  dr = dS^T q_rope

c is key and value, so one product's accumulator takes both its gradients. A program keeps dq of its
queries in registers and adds dc and dr of every tile to float32 sums in memory: L + R numbers a key
head, which stay in the L2 cache, where sums of dq would be P / G times as many.
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

from mlra_kernels.latent_attention.tiles import load_rows, place_program

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def row_products(
    a_ptr, b_ptr, out_ptr, s, b,
    P: gl.constexpr, L: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """sum over the last dim of a * b, both `[s, b, P, L]` -> `[b, P, s]` float32.

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
def _probabilities(
    x, lse, log2_scale, places, first, place, N: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """exp(scale x - lse), lse in base 2, and 0 for keys behind the query."""
    p = gl.exp2(x * log2_scale - lse[:, None])
    if first + N > place:
        columns = first + gl.arange(0, N, gl.SliceLayout(0, layout))
        p = gl.where(places[:, None] >= columns[None, :], p, 0.0)
    return p


@gluon.jit
def latent_attention_backward(
    q_nope_desc, q_rope_desc, key_nope_desc, key_rope_desc, do_desc, dq_nope_desc, dq_rope_desc,
    dkey_ptr, lse_ptr, delta_ptr, s, t, b, scale, log2_scale,
    P: gl.constexpr, G: gl.constexpr, L: gl.constexpr, R: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """q, dq `[s, b, P, L + R]`; key `[t, b, G, L + R]`; dO `[s, b, P, L]`; lse, delta `[b, P, s]`
    and dkey `[t, b, G, L + R]`, to which is added, in float32.

    Programs: (query tile, the longest first; pair; sequence). EVEN: N divides t. Matrix products
    end in the order they begin in, so a wait for all but n waits for the older ones:

        dq of tile j | scores of tile j + 1 | dc, dr of tile j | dP of tile j + 1

    The probabilities of j + 1 are made while dc is, the sums leave while dP is.
    """
    warps: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = do_desc.dtype
    pair, seq, start, place, q_column, k_column, tiles = place_program(s, t, P, G, L + R, M, N)

    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, N, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, L, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, R, 16])
    along: gl.constexpr = N // 16
    across: gl.constexpr = warps // along
    key_wide: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [along, across], [16, L // across, 16]
    )
    key_narrow: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [along, across], [16, R // across, 16]
    )
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, N], dtype)
    q_nope = gl.allocate_shared_memory(dtype, [M, L], q_nope_desc.layout)
    q_rope = gl.allocate_shared_memory(dtype, [M, R], q_rope_desc.layout)
    do = gl.allocate_shared_memory(dtype, [M, L], do_desc.layout)
    c_ring = gl.allocate_shared_memory(dtype, [STAGES, N, L], key_nope_desc.layout)
    r_ring = gl.allocate_shared_memory(dtype, [STAGES, N, R], key_rope_desc.layout)
    p_ring = gl.allocate_shared_memory(dtype, [2, M, N], square)
    ds_ring = gl.allocate_shared_memory(dtype, [2, M, N], square)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES + 2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 2):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()  # the copy engine sees the barriers

    q_bar, do_bar = bars.index(STAGES), bars.index(STAGES + 1)
    load_rows(q_nope_desc, q_rope_desc, start, q_column, q_nope, q_rope, q_bar, L)
    for i in gl.static_range(STAGES - 1):
        if i < tiles:
            load_rows(
                key_nope_desc, key_rope_desc, i * N, k_column,
                c_ring.index(i), r_ring.index(i), bars.index(i), L,
            )  # fmt: skip
    mbarrier.expect(do_bar, do_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(do_desc, [start, (seq * P + pair) * L], do_bar, do)
    rows = start + gl.arange(0, M, gl.SliceLayout(1, scores))
    places = rows + (t - s)
    at = (seq * P + pair) * s + rows
    lse = gl.load(lse_ptr + at, rows < s, 0.0) * LOG2E
    delta = gl.load(delta_ptr + at, rows < s, 0.0) * scale

    zero = gl.zeros([M, N], gl.float32, scores)
    dq_nope = gl.zeros([M, L], gl.float32, wide)
    dq_rope = gl.zeros([M, R], gl.float32, narrow)
    zero_c = gl.zeros([N, L], gl.float32, key_wide)
    zero_r = gl.zeros([N, R], gl.float32, key_narrow)
    n_wide = gl.arange(0, N, gl.SliceLayout(1, key_wide))
    l_wide = gl.arange(0, L, gl.SliceLayout(0, key_wide))
    n_narrow = gl.arange(0, N, gl.SliceLayout(1, key_narrow))
    r_narrow = gl.arange(0, R, gl.SliceLayout(0, key_narrow))
    pitch = b * G * (L + R)

    mbarrier.wait(q_bar, 0)
    mbarrier.wait(bars.index(0), 0)
    c, r = c_ring.index(0).permute((1, 0)), r_ring.index(0).permute((1, 0))
    x = warpgroup_mma(q_nope, c, zero, use_acc=False, is_async=True)
    x = warpgroup_mma(q_rope, r, x, is_async=True)
    mbarrier.wait(do_bar, 0)
    dp = warpgroup_mma(do, c, zero, use_acc=False, is_async=True)
    x = warpgroup_mma_wait(1, deps=[x])
    p = _probabilities(x, lse, log2_scale, places, 0, place, N, scores)
    p_ring.index(0).store(p.to(dtype))

    for j in range(tiles):
        first = j * N
        stage, after = j % STAGES, (j + 1) % STAGES
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = p * (dp * scale - delta[:, None])
        # Two tiles of p and dS: other warps may still be at the products of the one before.
        p_tile, ds_tile = p_ring.index(j & 1), ds_ring.index(j & 1)
        ds_tile.store(ds.to(dtype))
        fence_async_shared()
        gl.thread_barrier()

        dq_nope = warpgroup_mma(ds_tile, c_ring.index(stage), dq_nope, is_async=True)
        dq_rope = warpgroup_mma(ds_tile, r_ring.index(stage), dq_rope, is_async=True)
        # After the last tile comes an old one again, whose scores nobody uses.
        mbarrier.wait(bars.index(after), ((j + 1) // STAGES) & 1, pred=j + 1 < tiles)
        c, r = c_ring.index(after).permute((1, 0)), r_ring.index(after).permute((1, 0))
        x = warpgroup_mma(q_nope, c, zero, use_acc=False, is_async=True)
        x = warpgroup_mma(q_rope, r, x, is_async=True)
        p_turned, ds_turned = p_tile.permute((1, 0)), ds_tile.permute((1, 0))
        dc = warpgroup_mma(p_turned, do, zero_c, use_acc=False, is_async=True)
        dc = warpgroup_mma(ds_turned, q_nope, dc, is_async=True)
        dr = warpgroup_mma(ds_turned, q_rope, zero_r, use_acc=False, is_async=True)
        dp = warpgroup_mma(do, c, zero, use_acc=False, is_async=True)

        # Past the barrier above every warp is done with the tile before: its stage is free.
        ahead = j + STAGES - 1
        if ahead < tiles:
            load_rows(
                key_nope_desc, key_rope_desc, ahead * N, k_column,
                c_ring.index(ahead % STAGES), r_ring.index(ahead % STAGES),
                bars.index(ahead % STAGES), L,
            )  # fmt: skip
        dq_nope, dq_rope, x = warpgroup_mma_wait(4, deps=[dq_nope, dq_rope, x])
        p = _probabilities(x, lse, log2_scale, places, first + N, place, N, scores)
        p_ring.index((j + 1) & 1).store(p.to(dtype))
        dc, dr = warpgroup_mma_wait(1, deps=[dc, dr])
        to = dkey_ptr + (first.to(gl.int64) * pitch + k_column)
        to_wide = (to + n_wide * pitch)[:, None] + l_wide[None, :]
        to_narrow = (to + L + n_narrow * pitch)[:, None] + r_narrow[None, :]
        if EVEN:
            gl.atomic_add(to_wide, dc, sem="relaxed")
            gl.atomic_add(to_narrow, dr, sem="relaxed")
        else:
            gl.atomic_add(to_wide, dc, (first + n_wide < t)[:, None], sem="relaxed")
            gl.atomic_add(to_narrow, dr, (first + n_narrow < t)[:, None], sem="relaxed")

    warpgroup_mma_wait(0, deps=[dp])
    gl.thread_barrier()
    q_nope.store(dq_nope.to(dtype))
    q_rope.store(dq_rope.to(dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(dq_nope_desc, [start, q_column], q_nope)
    tma.async_copy_shared_to_global(dq_rope_desc, [start, q_column + L], q_rope)
    tma.store_wait(0)
    for i in gl.static_range(STAGES + 2):
        mbarrier.invalidate(bars.index(i))
