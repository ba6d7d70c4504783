"""Triton kernel of a sum over ranks, with the residual add and RMSNorm behind it, in one launch.

Letters: T tokens, d hidden size, H = ceil(d / 2), W ranks. A program takes one token.

A **box** is a rank's memory that its peers write: int64 words `[2, W, rows, WORDS]`, by turn, by
sender, by token. A word holds a **stamp** in its upper 32 bits and data in its lower: numbers i and
H + i of a row, or one number of float32. The hardware writes a word whole. So a reader that finds
the right stamp has the data, and no fence and no signal is needed.

A row's stamp is the number of calls that have had this row, counted on every rank in memory of its
own. The turn is the stamp's last bit. A rank writes a turn again two calls later. Its call between
these ended with words that the peer sent behind its own call before, whose reads were done then. So
two turns are enough, for any sequence of calls with any numbers of tokens, in graphs or not.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda


@triton.jit
def _bits(x):
    """Numbers of 16 or 32 bits -> the same bits in an int64."""
    if x.dtype.primitive_bitwidth == 32:
        return x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    else:
        return x.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF


@triton.jit
def _numbers(bits, dtype: tl.constexpr):
    """The lowest bits of an int64 as float32, of numbers of `dtype`."""
    if dtype.primitive_bitwidth == 32:
        return bits.to(tl.int32).to(dtype, bitcast=True)
    else:
        return bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _arrived(words, inside, stamp, patience):
    """The words, once all have the stamp. After `patience` looks in vain the kernel ends with a
    trap; after as many as a negative `patience` says, the words are returned as they are."""
    wanted = stamp.to(tl.int64) << 32
    found = tl.load(words, mask=inside, other=wanted, volatile=True)
    missing = tl.max(((found >> 32) != stamp).to(tl.int32), 0)
    looks = tl.abs(patience)
    while (missing > 0) & (looks > 0):
        found = tl.load(words, mask=inside, other=wanted, volatile=True)
        missing = tl.max(((found >> 32) != stamp).to(tl.int32), 0)
        looks -= 1
    if (missing > 0) & (patience > 0):
        tl.inline_asm_elementwise(
            "{ trap; mov.u32 $0, $1; }", "=r,r", [missing], dtype=tl.int32, is_pure=False, pack=1
        )
    return found


@triton.jit(do_not_specialize=["patience"])
def one_shot_kernel(
    x_ptr,  # [T, d], this rank's summand
    residual_ptr,  # [T, d]
    weight_ptr,  # [d]
    sum_ptr,  # [T, d]
    out_ptr,  # [T, d]
    boxes_ptr,  # [W] int64, addresses of the ranks' boxes
    calls_ptr,  # [rows] int32, stamps of the last calls
    stride_x,
    eps,
    rows,
    patience,
    d: tl.constexpr,
    H: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least H
    RANK: tl.constexpr,
    W: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl_cuda.gdc_launch_dependents()  # dependents wait for this kernel's end anyway
        tl_cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    low, high = i < H, i < d - H
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    wide: tl.constexpr = dtype.primitive_bitwidth == 32
    stamp = tl.load(calls_ptr + row) + 1
    turn = (stamp & 1).to(tl.int64)
    x_low = tl.load(x_ptr + row * stride_x + i, mask=low, other=0.0)
    x_high = tl.load(x_ptr + row * stride_x + H + i, mask=high, other=0.0)

    signed = stamp.to(tl.int64) << 32
    own = ((turn * W + RANK) * rows + row) * WORDS
    for step in tl.static_range(1, W):
        # Each rank begins with the one behind it, so that no rank is everyone's first.
        box = tl.load(boxes_ptr + (RANK + step) % W).to(tl.pointer_type(tl.int64))
        to = tl.multiple_of(box, 128) + own + i
        if wide:
            tl.store(to, signed | _bits(x_low), mask=low)
            tl.store(to + H, signed | _bits(x_high), mask=high)
        else:
            tl.store(to, signed | (_bits(x_high) << 16) | _bits(x_low), mask=low)

    # These loads are under way while the words are.
    residual_low = tl.load(residual_ptr + row * d + i, mask=low, other=0.0).to(tl.float32)
    residual_high = tl.load(residual_ptr + row * d + H + i, mask=high, other=0.0).to(tl.float32)
    weight_low = tl.load(weight_ptr + i, mask=low, other=0.0).to(tl.float32)
    weight_high = tl.load(weight_ptr + H + i, mask=high, other=0.0).to(tl.float32)

    mine = tl.multiple_of(tl.load(boxes_ptr + RANK).to(tl.pointer_type(tl.int64)), 128)
    sum_low = tl.zeros((BLOCK,), tl.float32)
    sum_high = tl.zeros((BLOCK,), tl.float32)
    for sender in tl.static_range(W):  # in the order of ranks, so that all ranks round alike
        if sender == RANK:
            sum_low += x_low.to(tl.float32)
            sum_high += x_high.to(tl.float32)
        else:
            words = mine + ((turn * W + sender) * rows + row) * WORDS + i
            found = _arrived(words, low, stamp, patience)
            sum_low += _numbers(found, dtype)
            if wide:
                found = _arrived(words + H, high, stamp, patience)
                sum_high += _numbers(found, dtype)
            else:
                sum_high += _numbers(found >> 16, dtype)
    tl.store(calls_ptr + row, stamp)

    # Rounded where an all-reduce followed by `add_rms_norm` rounds.
    total_low = (sum_low.to(dtype).to(tl.float32) + residual_low).to(dtype)
    total_high = (sum_high.to(dtype).to(tl.float32) + residual_high).to(dtype)
    tl.store(sum_ptr + row * d + i, total_low, mask=low)
    tl.store(sum_ptr + row * d + H + i, total_high, mask=high)
    total_low, total_high = total_low.to(tl.float32), total_high.to(tl.float32)
    squares = total_low * total_low + tl.where(high, total_high * total_high, 0.0)
    scale = tl.rsqrt(tl.sum(squares, 0) / d + eps)
    out = out_ptr + row * d + i
    tl.store(out, (total_low * scale * weight_low).to(dtype), mask=low)
    tl.store(out + H, (total_high * scale * weight_high).to(dtype), mask=high)
