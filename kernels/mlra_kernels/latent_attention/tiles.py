"""Parts of both kernels: a program's place, loads and stores of tiles, masks.

A tile of queries or keys has two parts side by side in memory: L latent and R RoPE columns.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mlra_kernels.gluon_names import async_load, async_store, barrier

MASKED = gl.constexpr(float("-inf"))
"""The score of a key that a query does not read."""


@gluon.jit
def opaque(x):
    """x (2 bytes per element) as packed pairs in registers; LLVM would keep x's inputs instead."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=True, pack=2)


@gluon.jit
def load_rows(nope_desc, rope_desc, row, column, nope, rope, bar, L: gl.constexpr):
    """Begin to load `[rows, L]` and, L columns on, `[rows, R]`; `bar` completes with both loads."""
    mbarrier.expect(bar, nope_desc.block_type.nbytes + rope_desc.block_type.nbytes)
    async_load(nope_desc, [row, column], bar, nope)
    async_load(rope_desc, [row, column + L], bar, rope)


@gluon.jit
def load_keys(
    nope_desc, rope_desc, keys, column, first, step, tiles, L: gl.constexpr, STAGES: gl.constexpr
):
    """Load `tiles` tiles of keys, from rows `first`, `first + step`, ..., into the stages of a ring
    in turn, each stage once all its readers have freed it."""
    c_ring, r_ring, full, free = keys
    for j in range(tiles):
        stage = j % STAGES
        mbarrier.wait(free.index(stage), (j // STAGES + 1) & 1)
        load_rows(
            nope_desc, rope_desc, first + j * step, column,
            c_ring.index(stage), r_ring.index(stage), full.index(stage), L,
        )  # fmt: skip


@gluon.jit
def place_program(P: gl.constexpr, G: gl.constexpr, W: gl.constexpr, M: gl.constexpr):
    """The place of a program of the grid (query tile, the last first; pair; sequence).

    Returns: index of (sequence, pair) in `[b, P]`; first query; first columns of the pair's queries
    and keys, W wide each.
    """
    pair, seq = gl.program_id(1), gl.program_id(2)
    start = (gl.num_programs(0) - 1 - gl.program_id(0)) * M
    head = seq * P + pair
    return head, start, head * W, (seq * G + pair // (P // G)) * W


@gluon.jit
def place_tile(tiles_ptr, s, t, P: gl.constexpr, G: gl.constexpr, W: gl.constexpr, M: gl.constexpr):
    """The place of a program of the grid (tile of queries and pair; sequence). Numbers of the list
    of tiles are clamped, so that a wrong list cannot lead out of bounds.

    Returns: index of (sequence, pair) in `[b, P]`; at most M queries and at least one key as (first
    query, end of queries, first key, end of keys); first columns of the pair's queries and keys.
    """
    pair, seq = gl.program_id(0) % P, gl.program_id(1)
    row = tiles_ptr + gl.program_id(0) // P * 4
    start = gl.maximum(gl.minimum(gl.load(row), s - 1), 0)
    end = gl.maximum(gl.minimum(gl.load(row + 1), gl.minimum(start + M, s)), start)
    first = gl.maximum(gl.minimum(gl.load(row + 2), t - 1), 0)
    stop = gl.maximum(gl.minimum(gl.load(row + 3), t), first + 1)
    head = seq * P + pair
    return head, (start, end, first, stop), head * W, (seq * G + pair // (P // G)) * W


@gluon.jit
def tiles_of_half(start, first, reading, m: gl.constexpr, N: gl.constexpr):
    """Tiles of N keys, from key `first` on, that the m queries from `start` on read; 0 if none."""
    _, end, _, _ = reading
    _, last = keys_read(start + m - 1, reading, False)
    tiles = 0
    if start < end:
        tiles = gl.maximum((last - first) // N + 1, 0)
    return tiles


@gluon.jit
def pass_tiles(begin, end, full, free, STAGES: gl.constexpr):
    """Free tiles `begin` to `end` unread. Each is waited for, since a barrier's parity bit tells
    fillings of a stage apart only if every filling is waited for."""
    for j in range(begin, end):
        mbarrier.wait(full.index(j % STAGES), (j // STAGES) & 1)
        barrier()
        mbarrier.arrive(free.index(j % STAGES), count=1)


@gluon.jit
def store_rows(desc, ptr, tile, start, end, pitch, column, m: gl.constexpr, C: gl.constexpr):
    """Copy the rows of a tile `[m, C]` of shared memory that lie before `end` to rows `start` on.
    The copy engine copies whole tiles only; rows from `end` on belong to another program."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [gl.num_warps(), 1], [1, 0])
    if start + m <= end:
        async_store(desc, [start, column], tile)
    else:
        rows = start + gl.arange(0, m, gl.SliceLayout(1, layout))
        columns = gl.arange(0, C, gl.SliceLayout(0, layout))
        live = (rows < end)[:, None] & (columns < C)[None, :]
        at = (rows.to(gl.int64) * pitch + column)[:, None] + columns[None, :]
        gl.store(ptr + at, tile.load(layout), live)


@gluon.jit
def keys_read(query, reading, RANGES: gl.constexpr):
    """First and last key of a query: its range, or 0 and query + past.

    A query behind the last one reads the last query's range or, without RANGES, up to key t - 1.
    """
    ranges_ptr, s, t, past = reading
    if RANGES:
        query = gl.minimum(query, s - 1)
        first, last = gl.load(ranges_ptr + query), gl.load(ranges_ptr + s + query)
    else:
        first, last = 0, gl.minimum(query + past, t - 1)
    return first, last


@gluon.jit
def tiles_read(start, count: gl.constexpr, reading, N: gl.constexpr, RANGES: gl.constexpr):
    """First tile of N keys that the `count` queries from `start` on read, and number of tiles."""
    first, _ = keys_read(start, reading, RANGES)
    _, last = keys_read(start + count - 1, reading, RANGES)
    if RANGES:  # clamped: at least one tile, and none behind the last key
        last = gl.maximum(gl.minimum(last, reading[2] - 1), 0)
        first = gl.maximum(gl.minimum(first, last), 0)
    return first // N, last // N - first // N + 1


@gluon.jit
def keys_read_by_all(start, count: gl.constexpr, reading, RANGES: gl.constexpr):
    """First and last of the keys that all of the `count` queries from `start` on read."""
    first, _ = keys_read(start + count - 1, reading, RANGES)
    _, last = keys_read(start, reading, RANGES)
    return first, last


@gluon.jit
def mask_diagonal(x, tile, last, zero, m: gl.constexpr, N: gl.constexpr, layout: gl.constexpr):
    """Scores x `[m, N]` of a tile of keys, MASKED where key tile * N + j > last + i of query i.

    zero: 0, unknown to the compiler in a loop, so that it computes `queries` in every iteration.
    """
    if tile * N + N - 1 > last:
        queries = gl.arange(0, m, gl.SliceLayout(1, layout)) + (last + zero)
        keys = tile * N + gl.arange(0, N, gl.SliceLayout(0, layout))
        x = gl.where(queries[:, None] >= keys[None, :], x, MASKED)
    return x


@gluon.jit
def mask(
    x, key, start, by_all, reading, m: gl.constexpr, N: gl.constexpr, layout: gl.constexpr,
    RANGES: gl.constexpr,
):  # fmt: skip
    """Scores x `[m, N]` of queries from `start` and keys from `key` on, MASKED where not read."""
    partly = key + N - 1 > by_all[1]
    if RANGES:
        partly = partly | (key < by_all[0])
    if partly:
        queries = start + gl.arange(0, m, gl.SliceLayout(1, layout))
        keys = (key + gl.arange(0, N, gl.SliceLayout(0, layout)))[None, :]
        first, last = keys_read(queries, reading, RANGES)
        x = gl.where(last[:, None] >= keys, x, MASKED)
        if RANGES:
            x = gl.where(first[:, None] <= keys, x, MASKED)
    return x
