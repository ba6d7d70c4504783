"""What both kernels share: loading rows whose two parts lie side by side."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def load_rows(nope_desc, rope_desc, row, column, nope, rope, bar, L: gl.constexpr):
    """Begin to load `[rows, L]` and, L columns further, `[rows, R]`; `bar` completes with both."""
    mbarrier.expect(bar, nope_desc.block_type.nbytes + rope_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(nope_desc, [row, column], bar, nope)
    tma.async_copy_global_to_shared(rope_desc, [row, column + L], bar, rope)
