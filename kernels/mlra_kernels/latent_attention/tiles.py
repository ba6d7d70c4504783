"""What both kernels share: a program's place, tiles whose two parts lie side by side in memory."""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

MASKED = gl.constexpr(float("-inf"))
"""A score of a key that a query does not read."""


@builtin
def async_add_shared_to_global(tensor_desc, coord, src, _semantic=None):
    """Begin to add a tile of shared memory to one in memory, as `tma.async_copy_shared_to_global`
    copies it; Triton 3.6 has this operation of the copy engine and no name for it in Gluon."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


@gluon.jit
def opaque(x):
    """x of 2 bytes an element, kept in pairs in registers: LLVM would keep what it was made of."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=True, pack=2)


@gluon.jit
def load_rows(nope_desc, rope_desc, row, column, nope, rope, bar, L: gl.constexpr):
    """Begin to load `[rows, L]` and, L columns further, `[rows, R]`; `bar` completes with both."""
    mbarrier.expect(bar, nope_desc.block_type.nbytes + rope_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(nope_desc, [row, column], bar, nope)
    tma.async_copy_global_to_shared(rope_desc, [row, column + L], bar, rope)


@gluon.jit
def load_keys(
    nope_desc, rope_desc, keys, column, first, step, tiles, L: gl.constexpr, STAGES: gl.constexpr
):
    """Load `tiles` tiles of keys, the rows from `first` and every `step` on, one after the other
    into the stages of a ring, each once all its readers have said that it is free."""
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
    """Of a program (query tile, the last first; pair; sequence).

    Returns: its (sequence, pair), counted through; its first query; columns of the pair's queries
    and keys, W wide each.
    """
    pair, seq = gl.program_id(1), gl.program_id(2)
    start = (gl.num_programs(0) - 1 - gl.program_id(0)) * M
    head = seq * P + pair
    return head, start, head * W, (seq * G + pair // (P // G)) * W


@gluon.jit
def keys_read(query, reading, RANGES: gl.constexpr):
    """First and last key of a query: of its range, or 0 and query + past.

    Queries behind the last read as that one does, or rows of zeros in the last tile.
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
    """Of the tiles of N keys that `count` queries from `start` on read: the first, how many."""
    first, _ = keys_read(start, reading, RANGES)
    _, last = keys_read(start + count - 1, reading, RANGES)
    if RANGES:  # whatever they hold: at least one tile, and none behind the last key
        last = gl.maximum(gl.minimum(last, reading[2] - 1), 0)
        first = gl.maximum(gl.minimum(first, last), 0)
    return first // N, last // N - first // N + 1


@gluon.jit
def keys_read_by_all(start, count: gl.constexpr, reading, RANGES: gl.constexpr):
    """First and last of the keys that each of `count` queries from `start` on reads."""
    first, _ = keys_read(start + count - 1, reading, RANGES)
    _, last = keys_read(start, reading, RANGES)
    return first, last


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
