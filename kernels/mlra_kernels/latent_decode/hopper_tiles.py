"""What the Hopper kernel of decoding does to one tile. Letters: see hopper_kernel.py."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SCALE_MAX = gl.constexpr(146.0)  # times 448, the largest e4m3: just inside fp16
E4M3_MAX = gl.constexpr(448.0)


@gluon.jit
def quantise_rows(x, tiles, TERMS: gl.constexpr):
    """Write rows x `[M, D]` float32 over their scales to e4m3 tiles `[TERMS, M, D]`, whose sum they
    are: the second holds what the first rounds away, so that 2^-8 remains of its 2^-4.

    Returns:
        The scales `[M]`: a row's largest number over 448.
    """
    scale = gl.maximum(gl.max(gl.maximum(x, -x), 1), 1.0e-20) / E4M3_MAX
    x = x / scale[:, None]
    for term in gl.static_range(TERMS):
        rounded = x.to(gl.float8e4nv)
        tiles.index(term).store(rounded)
        x = x - rounded.to(gl.float32)
    return scale


@gluon.jit
def zero_rows(ring_tile, rows_in, N: gl.constexpr, C: gl.constexpr):
    """Zero the rows of a shared tile `[N, C]` from `rows_in` on: unused cache may hold NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    x = ring_tile.load(LAYOUT)
    n = gl.arange(0, N, gl.SliceLayout(1, LAYOUT))
    ring_tile.store(gl.where((n < rows_in)[:, None], x, 0.0).to(x.dtype))


@gluon.jit
def widen(c, scale, wide, rows_in, N: gl.constexpr, D: gl.constexpr):
    """Write an FP8 shared tile `[N, D]` times the scales `[N]` of its tokens to `wide`, as fp16.

    Scales from row `rows_in` on count as 0: unused cache may hold NaN.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    row_scale = gl.where(gl.arange(0, N, ROW) < rows_in, scale.load(ROW), 0.0)
    row_scale = gl.minimum(row_scale, SCALE_MAX).to(gl.float16)
    x, row_scale = gl.broadcast(c.load(LAYOUT), row_scale[:, None])
    x = gl.inline_asm_elementwise(  # the compiler would multiply one number at a time
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
    """Sum what each thread holds of a row of a score tile `[M, N]`: `[M, N / S_N, 4]`.

    No thread waits for another; the sum over the threads of a row is taken once a sequence.
    """
    M: gl.constexpr = p.shape[0]
    parts = p.reshape([M, p.shape[1] // S_N, S_N // 8, 4, 2])
    return gl.sum(gl.sum(parts, 4), 2)


@gluon.jit
def merge(acc, m_i, l_i, m_o, l_o, other, O_ROW: gl.constexpr):
    """Merge the state (other, m_o, l_o) of another consumer into (acc, m_i, l_i)."""
    m_new = gl.maximum(m_i, m_o)
    a_i = gl.exp2(m_i - m_new)
    a_o = gl.exp2(m_o - m_new)
    acc = acc * gl.convert_layout(a_i, O_ROW)[:, None]
    acc += other * gl.convert_layout(a_o, O_ROW)[:, None]
    return acc, m_new, l_i * a_i + l_o * a_o
