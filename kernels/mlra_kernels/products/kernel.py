"""Triton kernel of y = x W^T for a few rows x: a stream of W, with what is around it fused.

A step of a few tokens multiplies so little that reading W is all it costs. So each program reads
whole rows of W, `CHUNK` columns at a time, the next chunk while it multiplies this one, and keeps
partial sums in float32 registers: no shared memory, no tensor cores, no atomic additions. The order
of the additions depends on the configuration alone, so results are reproducible.

Letters: T tokens, K columns of W (inputs), R rows of W (outputs), S programs.

Programmatic dependent launch (`EARLY`), the rule:

A kernel launched with the attribute may start while the kernel before it in the stream still runs,
as soon as all programs of that one have signalled (`gdc_launch_dependents`) or ended. If that one
was started early too and signalled before its own wait, the kernel before it may also still run,
and so on. `gdc_wait` returns when the kernel directly before has ended and its writes are visible;
it says nothing of kernels further back. Therefore every kernel that is launched with the attribute
  1. calls `gdc_wait` in every program, on every path: its end then implies that everything before
     it has ended, and so, by induction, does the return of the next kernel's wait;
  2. before the wait reads only what no kernel of the stream writes any more (weights), and writes
     nothing: the memory of its outputs may still be read by kernels that run;
  3. may signal at any place, as what the next kernel may do before its wait is rule 2's.
A kernel without the attribute starts when everything before it has ended, so it may stand anywhere
between. Weights must be complete before the last such kernel in front of a product: in an engine's
step that is the look-up of the embedding.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

PLAIN = tl.constexpr(0)
ADD = tl.constexpr(1)
"""y + other, `other` the residual `[T, R]`."""
GATE = tl.constexpr(2)
"""other * sigmoid(y)."""
SWIGLU = tl.constexpr(3)
"""silu(first half of y) * second half: `[T, R / 2]`."""
ROTATE = tl.constexpr(4)
"""Half-split RoPE of dims START to HEAD - 1 of every HEAD numbers of y."""

NAMES = "plain", "add", "gate", "swiglu", "rotate"
"""Of the epilogues, in the kernels' names."""


def _name(build) -> str:
    """A build's name, which tells a trace the epilogue and W: `product_kernel_add_3072x3072`."""
    sizes = build.constants
    return f"product_kernel_{NAMES[sizes['EPILOGUE']]}_{sizes['R']}x{sizes['K']}"


@triton.jit
def _rows_of(block, COUNT: tl.constexpr, N: tl.constexpr, EPILOGUE: tl.constexpr,
             HEAD: tl.constexpr, START: tl.constexpr):  # fmt: skip
    """The rows of W of a block, `[N]`, and for pairs of rows the second of each pair."""
    i = block * N + tl.arange(0, N)
    if EPILOGUE == SWIGLU:
        return i, i + COUNT
    elif EPILOGUE == ROTATE:
        head, j = i // (HEAD // 2), i % (HEAD // 2)
        still: tl.constexpr = START // 2
        half: tl.constexpr = (HEAD - START) // 2
        first = head * HEAD + tl.where(j < still, j, j + still)
        return first, first + tl.where(j < still, still, half)
    else:
        return i, i


@triton.jit
def _weights(w_ptr, rows, live, chunk, K: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk number `chunk` of rows of W, `[N, CHUNK]`; `live` `[N]`: rows to read."""
    k = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = live[:, None]
    if K % CHUNK:
        mask = mask & (k < K)[None, :]
    at = rows.to(tl.int64)[:, None] * STRIDE + k[None, :]
    # Read once: W should not push the few rows of x out of the L1 cache.
    return tl.load(w_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _inputs(x_ptr, norm_ptr, scale, chunk, K: tl.constexpr, CHUNK: tl.constexpr,
            NORM: tl.constexpr):  # fmt: skip
    """A chunk of a row of x `[CHUNK]` in float32, normed and rounded as a norm's output is."""
    k = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0)
    if NORM:
        weight = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * scale * weight).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def _scale(x_ptr, eps, K: tl.constexpr, CHUNK: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of a row of x."""
    total = tl.zeros((CHUNK,), tl.float32)
    for start in tl.static_range(0, K, CHUNK):
        k = start + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        total += x * x
    return tl.rsqrt(tl.sum(total, 0) / K + eps)


@triton.jit
def _added(sums, w, x):
    """sums `[N, CHUNK / 8]` plus w `[N, CHUNK]` times x `[CHUNK]`, eight neighbours at once: these
    are one thread's, so no thread waits for another."""
    parts = tl.reshape(w * x[None, :], (w.shape[0], w.shape[1] // 8, 8))
    return sums + tl.sum(parts, 2)


@triton.jit
def _finish(y, second, token, rows, seconds, live, i, other_ptr, cos_ptr, sin_ptr, position_ptr,
            out_ptr, stride_other, positions, COUNT: tl.constexpr, R: tl.constexpr,
            EPILOGUE: tl.constexpr, HEAD: tl.constexpr, START: tl.constexpr):  # fmt: skip
    """Write a token's outputs of a block: y `[N]`, and for pairs of rows `second`, in float32.

    Products are rounded to the output's type first, as they are where each operation is a kernel.
    """
    dtype = out_ptr.dtype.element_ty
    y = y.to(dtype).to(tl.float32)
    if EPILOGUE == SWIGLU:
        y = y * tl.sigmoid(y) * second.to(dtype).to(tl.float32)
        tl.store(out_ptr + token * COUNT + i, y.to(dtype), mask=live)
    elif EPILOGUE == ROTATE:
        second = second.to(dtype).to(tl.float32)
        half: tl.constexpr = (HEAD - START) // 2
        j = i % (HEAD // 2) - START // 2
        position = tl.load(position_ptr + token).to(tl.int64)
        # A position outside the tables gives NaN, so that the error shows.
        known = live & (j >= 0) & (position >= 0) & (position < positions)
        cos = tl.load(cos_ptr + position * half + j, mask=known, other=float("nan"))
        sin = tl.load(sin_ptr + position * half + j, mask=known, other=float("nan"))
        first = tl.where(j < 0, y, y * cos - second * sin)
        second = tl.where(j < 0, second, second * cos + y * sin)
        tl.store(out_ptr + token * R + rows, first.to(dtype), mask=live)
        tl.store(out_ptr + token * R + seconds, second.to(dtype), mask=live)
    else:
        if EPILOGUE != PLAIN:
            other = tl.load(other_ptr + token * stride_other + rows, mask=live, other=0.0)
            other = other.to(tl.float32)
            if EPILOGUE == ADD:
                y += other
            else:
                y = other * tl.sigmoid(y).to(dtype).to(tl.float32)
        tl.store(out_ptr + token * R + rows, y.to(dtype), mask=live)


@triton.jit(repr=_name)
def product_kernel(
    x_ptr,  # [T, K]
    w_ptr,  # [R, K]
    norm_ptr,  # [K], NORM only
    other_ptr,  # [T, R], ADD and GATE only
    cos_ptr,  # [positions, (HEAD - START) / 2] fp32, ROTATE only
    sin_ptr,
    position_ptr,  # [T], ROTATE only
    out_ptr,  # [T, R], for SWIGLU [T, R / 2]
    eps,
    stride_x,
    stride_other,
    positions,
    T: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,  # from a row of W to the next
    N: tl.constexpr,  # rows, or pairs of rows, of a block
    CHUNK: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HEAD: tl.constexpr,
    START: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (S,): program s computes the blocks s, s + S, ... of N rows or pairs of rows."""
    PAIRS: tl.constexpr = EPILOGUE >= 3
    COUNT: tl.constexpr = R // 2 if PAIRS else R
    BLOCKS: tl.constexpr = (COUNT + N - 1) // N
    CHUNKS: tl.constexpr = (K + CHUNK - 1) // CHUNK
    if EARLY:
        tl_cuda.gdc_launch_dependents()
    first = tl.program_id(0)
    rows, seconds = _rows_of(first, COUNT, N, EPILOGUE, HEAD, START)
    live = first * N + tl.arange(0, N) < COUNT
    w = _weights(w_ptr, rows, live, 0, K, STRIDE, CHUNK)
    w2 = w
    if PAIRS:
        w2 = _weights(w_ptr, seconds, live, 0, K, STRIDE, CHUNK)
    if EARLY:
        tl_cuda.gdc_wait()
    scales = ()
    for t in tl.static_range(T):
        if NORM:
            scales += (_scale(x_ptr + t * stride_x, eps, K, CHUNK),)
        else:
            scales += (1.0,)
    for block in range(first, BLOCKS, tl.num_programs(0)):
        sums = ()
        sums2 = ()
        for _ in tl.static_range(T):
            sums += (tl.zeros((N, CHUNK // 8), tl.float32),)
            sums2 += (tl.zeros((N, CHUNK // 8), tl.float32),)
        for chunk in range(CHUNKS):
            # The chunk after this one: of the same rows, or the first of the next block's.
            same = chunk + 1 < CHUNKS
            then = tl.where(same, block, block + tl.num_programs(0))
            after = tl.where(same, chunk + 1, 0)
            rows, seconds = _rows_of(then, COUNT, N, EPILOGUE, HEAD, START)
            live = then * N + tl.arange(0, N) < COUNT
            coming = _weights(w_ptr, rows, live, after, K, STRIDE, CHUNK)
            coming2 = coming
            if PAIRS:
                coming2 = _weights(w_ptr, seconds, live, after, K, STRIDE, CHUNK)
            more = ()
            more2 = ()
            wide = w.to(tl.float32)
            wide2 = w2.to(tl.float32)
            for t in tl.static_range(T):
                x = _inputs(x_ptr + t * stride_x, norm_ptr, scales[t], chunk, K, CHUNK, NORM)
                more += (_added(sums[t], wide, x),)
                if PAIRS:
                    more2 += (_added(sums2[t], wide2, x),)
                else:
                    more2 += (sums2[t],)
            sums = more
            sums2 = more2
            w = coming
            w2 = coming2
        i = block * N + tl.arange(0, N)
        rows, seconds = _rows_of(block, COUNT, N, EPILOGUE, HEAD, START)
        for t in tl.static_range(T):
            y = tl.sum(sums[t], 1)
            second = y
            if PAIRS:
                second = tl.sum(sums2[t], 1)
            _finish(
                y, second, t, rows, seconds, i < COUNT, i, other_ptr, cos_ptr, sin_ptr,
                position_ptr, out_ptr, stride_other, positions, COUNT, R, EPILOGUE, HEAD, START,
            )  # fmt: skip
