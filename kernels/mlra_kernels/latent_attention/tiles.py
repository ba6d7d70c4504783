"""What both kernels share: a program's place, and loading rows whose two parts lie side by side."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def load_rows(nope_desc, rope_desc, row, column, nope, rope, bar, L: gl.constexpr):
    """Begin to load `[rows, L]` and, L columns further, `[rows, R]`; `bar` completes with both."""
    mbarrier.expect(bar, nope_desc.block_type.nbytes + rope_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(nope_desc, [row, column], bar, nope)
    tma.async_copy_global_to_shared(rope_desc, [row, column + L], bar, rope)


@gluon.jit
def place_program(
    s, t, P: gl.constexpr, G: gl.constexpr, W: gl.constexpr, M: gl.constexpr, N: gl.constexpr
):  # fmt: skip
    """Of a program (query tile, the longest first; pair; sequence).

    Returns: pair and sequence; its first query, and that one's place among the keys; columns of the
    pair's queries and keys, W wide each; the tiles of N keys that its M queries read.
    """
    pair, seq = gl.program_id(1), gl.program_id(2)
    start = (gl.num_programs(0) - 1 - gl.program_id(0)) * M
    place = start + t - s
    q_column = (seq * P + pair) * W
    k_column = (seq * G + pair // (P // G)) * W
    return pair, seq, start, place, q_column, k_column, gl.cdiv(gl.minimum(place + M, t), N)
