"""Forward of the absorbed core: a tile of latents is loaded once, as keys and as values.

Letters: s queries and t keys a sequence, b sequences, P (branch, head) pairs, G key heads, L latent
dim, R RoPE dim; a program takes M queries of a pair and goes through the keys in tiles of N.
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

LN2 = gl.constexpr(0.6931471805599453)
MASKED = gl.constexpr(-1.0e30)


@gluon.jit
def latent_attention_forward(
    q_nope_desc, q_rope_desc, key_nope_desc, key_rope_desc, out_desc, lse_ptr,
    s, t, log2_scale,
    P: gl.constexpr, G: gl.constexpr, L: gl.constexpr, R: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """q `[s, b, P, L + R]`, key `[t, b, G, L + R]` -> out `[s, b, P, L]`, lse `[b, P, s]`.

    Query i reads the keys up to i + t - s. lse is the natural logarithm, float32; log2_scale =
    softmax scale * log2(e). Programs: (query tile, the longest first; pair; sequence). Tiles of
    keys come from the last, so only the first ones are masked; STAGES is at least 3: one is read,
    one is waited for, one is under way.
    """
    warps: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = out_desc.dtype
    pair, seq, start, place, q_column, k_column, tiles = place_program(s, t, P, G, L + R, M, N)

    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, N, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, L, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, values, 2)
    q_nope = gl.allocate_shared_memory(dtype, [M, L], q_nope_desc.layout)
    q_rope = gl.allocate_shared_memory(dtype, [M, R], q_rope_desc.layout)
    c_ring = gl.allocate_shared_memory(dtype, [STAGES, N, L], key_nope_desc.layout)
    r_ring = gl.allocate_shared_memory(dtype, [STAGES, N, R], key_rope_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()  # the copy engine sees the barriers

    q_bar = bars.index(STAGES)
    load_rows(q_nope_desc, q_rope_desc, start, q_column, q_nope, q_rope, q_bar, L)
    for i in gl.static_range(STAGES - 1):
        if i < tiles:
            load_rows(
                key_nope_desc, key_rope_desc, (tiles - 1 - i) * N, k_column,
                c_ring.index(i), r_ring.index(i), bars.index(i), L,
            )  # fmt: skip
    rows = start + gl.arange(0, M, gl.SliceLayout(1, scores))
    places = rows + (t - s)
    zero = gl.zeros([M, N], gl.float32, scores)
    out = gl.zeros([M, L], gl.float32, values)

    mbarrier.wait(q_bar, 0)
    mbarrier.wait(bars.index(0), 0)
    c, r = c_ring.index(0).permute((1, 0)), r_ring.index(0).permute((1, 0))
    x = warpgroup_mma(q_nope, c, zero, use_acc=False, is_async=True)
    x = warpgroup_mma(q_rope, r, x, is_async=True)
    x = warpgroup_mma_wait(0, deps=[x])
    columns = (tiles - 1) * N + gl.arange(0, N, gl.SliceLayout(0, scores))
    # A row that is masked whole takes exp2(0); the next tile shrinks that to nothing.
    x = gl.where(places[:, None] >= columns[None, :], x * log2_scale, MASKED)
    top = gl.max(x, 1)
    p = gl.exp2(x - top[:, None])
    total = gl.sum(p, 1)
    p = gl.convert_layout(p.to(dtype), operand)

    for j in range(1, tiles):
        first = (tiles - 1 - j) * N
        stage, before = j % STAGES, (j - 1) % STAGES
        mbarrier.wait(bars.index(stage), (j // STAGES) & 1)
        c, r = c_ring.index(stage).permute((1, 0)), r_ring.index(stage).permute((1, 0))
        x = warpgroup_mma(q_nope, c, zero, use_acc=False, is_async=True)
        x = warpgroup_mma(q_rope, r, x, is_async=True)
        out = warpgroup_mma(p, c_ring.index(before), out, is_async=True)
        # The softmax of this tile while the values of the one before are summed.
        x = warpgroup_mma_wait(1, deps=[x])
        if first + N > place:
            columns = first + gl.arange(0, N, gl.SliceLayout(0, scores))
            x = gl.where(places[:, None] >= columns[None, :], x, MASKED)
        higher = gl.maximum(top, gl.max(x, 1) * log2_scale)
        weights = gl.exp2(x * log2_scale - higher[:, None])
        shrink = gl.exp2(top - higher)
        total = total * shrink + gl.sum(weights, 1)
        top = higher
        # Named, so that the probabilities being read keep their registers until here.
        out, p = warpgroup_mma_wait(0, deps=[out, p])
        gl.thread_barrier()  # every warp is done with the stage of the tile before
        ahead = j + STAGES - 2
        if ahead < tiles:
            load_rows(
                key_nope_desc, key_rope_desc, (tiles - 1 - ahead) * N, k_column,
                c_ring.index(ahead % STAGES), r_ring.index(ahead % STAGES),
                bars.index(ahead % STAGES), L,
            )  # fmt: skip
        out = out * gl.convert_layout(shrink, gl.SliceLayout(1, values))[:, None]
        p = gl.convert_layout(weights.to(dtype), operand)

    out = warpgroup_mma(p, c_ring.index((tiles - 1) % STAGES), out, is_async=True)
    gl.store(lse_ptr + (seq * P + pair) * s + rows, (top + gl.log2(total)) * LN2, rows < s)
    out = warpgroup_mma_wait(0, deps=[out])
    out = out / gl.convert_layout(total, gl.SliceLayout(1, values))[:, None]
    gl.thread_barrier()
    q_nope.store(out.to(dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(out_desc, [start, (seq * P + pair) * L], q_nope)
    tma.store_wait(0)
    for i in gl.static_range(STAGES + 1):
        mbarrier.invalidate(bars.index(i))
