"""Triton kernel of a product per head for a few tokens: queries into latent space, values out.

Letters: T tokens, H heads, K inputs and J outputs of a head's product. Inputs and outputs of a head
may lie in parts (branches): number k is the k % PART-th of part k // PART. The rule of programmatic
dependent launch (`EARLY`) is kernel.py's.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda


def _name(build) -> str:
    """A build's name, which tells a trace a head's inputs and outputs: `heads_kernel_128to512`."""
    return f"heads_kernel_{build.constants['K']}to{build.constants['J']}"


@triton.jit
def _tile(w_ptr, k, j, K: tl.constexpr, J: tl.constexpr):
    """Rows k and columns j of a head's weights."""
    mask = (k < K)[:, None] & (j < J)[None, :]
    return tl.load(w_ptr + k[:, None] * J + j[None, :], mask=mask, other=0.0)


@triton.jit(repr=_name)
def heads_kernel(
    x_ptr,  # [T, H, K]
    w_ptr,  # [H, K, J], contiguous
    out_ptr,  # [T, H, J]
    x_token,  # strides of a token, a head and a part
    x_head,
    x_part,
    out_token,
    out_head,
    out_part,
    T: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    X_PART: tl.constexpr,
    OUT_PART: tl.constexpr,
    ROWS: tl.constexpr,  # inputs of a tile
    PASS: tl.constexpr,  # inputs of a tile that lie in different threads
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (J / COLUMNS, H)."""
    if EARLY:
        tl_cuda.gdc_launch_dependents()
    head = tl.program_id(1)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    w_ptr += head.to(tl.int64) * (K * J)
    w = _tile(w_ptr, row, j, K, J)
    if EARLY:
        tl_cuda.gdc_wait()
    sums = ()
    for _ in tl.static_range(T):
        sums += (tl.zeros((PASS, COLUMNS), tl.float32),)
    for start in range(0, K, ROWS):
        k = start + row
        coming = _tile(w_ptr, k + ROWS, j, K, J)
        wide = w.to(tl.float32)
        more = ()
        for t in tl.static_range(T):
            at = x_ptr + t * x_token + head * x_head + k // X_PART * x_part + k % X_PART
            x = tl.load(at, mask=k < K, other=0.0).to(tl.float32)
            parts = tl.reshape(wide * x[:, None], (ROWS // PASS, PASS, COLUMNS))
            more += (sums[t] + tl.sum(parts, 0),)
        sums = more
        w = coming
    out_ptr += head * out_head + j // OUT_PART * out_part + j % OUT_PART
    for t in tl.static_range(T):
        y = tl.sum(sums[t], 0)
        tl.store(out_ptr + t * out_token, y.to(out_ptr.dtype.element_ty), mask=j < J)
