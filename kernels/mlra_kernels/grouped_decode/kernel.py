"""Triton kernel of grouped-query decoding, split over a sequence's tokens.

Letters: b sequences, H query heads, K key/value heads, J = H / K, D head dim, N tokens of a tile,
P parts per sequence.
"""

import triton
import triton.language as tl


@triton.jit
def grouped_decode_kernel(
    q_ptr,  # [b, H, D]
    key_ptr,  # [pages, PAGE, K, D]
    value_ptr,  # [pages, PAGE, K, D]
    table_ptr,  # [b, max_pages] int32
    seqlens_ptr,  # [b] int32
    out_ptr,  # [P, b, H, D]
    lse_ptr,  # [P, b, H] fp32
    scale_log2,
    stride_qb,
    stride_qh,
    stride_table,
    capacity,  # tokens that the table holds of a sequence, and 32 bits can cut
    num_pages,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    J: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
):
    """One part of one sequence for the J query heads of a key head; grid (P, K, b).

    A length beyond the table gives NaN. A page id outside the cache reads some page of the cache.
    """
    part, kv_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts, batch = tl.num_programs(0), tl.num_programs(2)
    length = tl.load(seqlens_ptr + b)
    held = (length >= 0) & (length <= capacity)
    length = tl.where(held, length, 0)
    tiles = tl.maximum(tl.cdiv(tl.cdiv(length, parts), N), MIN_TOKENS // N)
    begin = part * tiles * N
    end = tl.minimum(begin + tiles * N, length)
    rows, dims, tile = tl.arange(0, M), tl.arange(0, D), tl.arange(0, N)
    heads = kv_head * J + rows
    q = tl.load(
        q_ptr + b * stride_qb + heads[:, None] * stride_qh + dims, mask=rows[:, None] < J, other=0.0
    )
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for first in tl.range(begin, end, N):
        page = tl.load(table_ptr + b * stride_table + first // PAGE)
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1).to(tl.int64)
        token = page * PAGE + first % PAGE + tile
        seen = first + tile < end
        at = (token[:, None] * KV_HEADS + kv_head) * D + dims
        k = tl.load(key_ptr + at, mask=seen[:, None], other=0.0)
        v = tl.load(value_ptr + at, mask=seen[:, None], other=0.0)
        scores = tl.where(seen, tl.dot(q, tl.trans(k)) * scale_log2, float("-inf"))
        new = tl.maximum(best, tl.max(scores, 1))
        p = tl.exp2(scores - new[:, None])
        kept = tl.exp2(best - new)
        total = total * kept + tl.sum(p, 1)
        acc = acc * kept[:, None] + tl.dot(p.to(v.dtype), v)
        best = new
    # A part without tokens gives 0 and -inf, which merging ignores.
    safe = tl.where(total == 0, 1.0, total)
    at = (part.to(tl.int64) * batch + b) * HEADS + heads
    lse = tl.where(total == 0, float("-inf"), (best + tl.log2(safe)) * 0.6931471805599453)
    # An impossible length gives NaN with a finite weight, which merging keeps.
    tl.store(lse_ptr + at, tl.where(held, lse, 0.0), mask=rows < J)
    acc = tl.where(held, acc / safe[:, None], float("nan")).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] * D + dims, acc, mask=rows[:, None] < J)
