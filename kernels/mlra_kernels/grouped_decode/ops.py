"""The public function of grouped-query decoding: checks, launch, merging of parts."""

import math

import torch
import triton
from torch import Tensor

from mlra_kernels import checks
from mlra_kernels.grouped_decode.kernel import grouped_decode_kernel
from mlra_kernels.grouped_decode.reference import grouped_decode_reference
from mlra_kernels.latent_decode.ops import merge_states

HEAD_DIMS = (16, 32, 64, 128, 256)
PAGE_UNIT = 64
"""Tokens of a tile, which lies in one page."""
MAX_GROUP = 128
"""Most query heads per key head."""
MOST_TOKENS = 2**31 - 2**17
"""Most tokens of a sequence: the kernel rounds its parts up to whole tiles in 32 bits."""
MIN_TOKENS = 256
"""Least tokens of a part, except the last."""


def grouped_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    *,
    backend: str = "mlra_kernels",
) -> tuple[Tensor, Tensor]:
    """Attend from one new token per sequence to a paged cache of keys and values.

    Args:
        q: `[b, H, D]` bf16 or fp16, rotated; query head i reads key head `i // (H / K)`.
        keys, values: `[pages, page_size, K, D]`, contiguous, in q's dtype; page_size a multiple of
            64 and D one of 16, 32, 64, 128, 256 for 'mlra_kernels'.
        block_table: `[b, max_pages]` int32; entries beyond a sequence's length are not read.
        cache_seqlens: `[b]` int32 lengths, the new token included. Length 0 gives 0; a length
            beyond the table gives NaN ('torch' raises ValueError), and so does one of more than
            2^31 - 2^17 tokens.
        softmax_scale: factor of the scores.
        backend: 'mlra_kernels' (CUDA) or 'torch' (the reference, any device).

    Returns:
        out `[b, H, D]` in q's dtype, and the natural log-sum-exp `[b, H]` fp32: -inf for length 0,
        meaningless where out is NaN.

    Raises:
        ValueError: an argument does not fit; the message names the value and the fix.
    """
    _check(q, keys, values, block_table, cache_seqlens, softmax_scale)
    if checks.resolve_backend(backend, q, half=True) == "torch":
        return grouped_decode_reference(q, keys, values, block_table, cache_seqlens, softmax_scale)
    num_pages, page_size, kv_heads, dim = keys.shape
    if page_size % PAGE_UNIT or dim not in HEAD_DIMS or q.shape[1] > MAX_GROUP * kv_heads:
        raise ValueError(
            f"page size is {page_size}, head dim {dim}, {q.shape[1]} query heads for {kv_heads}:"
            f" backend='mlra_kernels' takes pages of a multiple of {PAGE_UNIT}, a head dim of"
            f" {HEAD_DIMS} and {MAX_GROUP} query heads a key head; pass backend='torch'"
        )
    checks.check_reach("a sequence of q", q, 1)
    if len(q) == 0:
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    b, heads, _ = q.shape
    multiprocessors = 4
    if q.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    longest = block_table.shape[1] * page_size
    # Three programs of a multiprocessor load while others compute.
    parts = max(1, 3 * multiprocessors // (b * kv_heads))
    parts = min(parts, -(-longest // MIN_TOKENS))
    out = torch.empty(parts, b, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(parts, b, heads, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        grouped_decode_kernel[(parts, kv_heads, b)](
            q, keys, values, block_table, cache_seqlens, out, lse,
            softmax_scale * math.log2(math.e), q.stride(0), q.stride(1), block_table.stride(0),
            min(longest, MOST_TOKENS), num_pages,
            HEADS=heads, KV_HEADS=kv_heads, J=heads // kv_heads, M=max(16, triton.next_power_of_2(
                heads // kv_heads)), N=PAGE_UNIT, D=dim, PAGE=page_size, MIN_TOKENS=MIN_TOKENS,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return (out[0], lse[0]) if parts == 1 else merge_states(out, lse)


def _check(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
) -> None:
    checks.check_tensors(
        q=q, keys=keys, values=values, block_table=block_table, cache_seqlens=cache_seqlens
    )
    checks.check_number("softmax_scale", softmax_scale, positive=True)
    checks.check_dims("q", q, "[b, H, D]")
    checks.check_dims("keys", keys, "[pages, page_size, K, D]")
    pages, page_size, kv_heads, dim = keys.shape
    checks.check_sizes(
        pages=pages, page_size=page_size, key_heads=kv_heads, head_dim=dim, query_heads=q.shape[1]
    )
    if q.shape[1] % kv_heads or q.shape[2] != dim or values.shape != keys.shape:
        raise ValueError(
            f"q is {tuple(q.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}: give"
            " [b, H, D] and twice [pages, page_size, K, D] with K dividing H"
        )
    checks.check_dtype("q", q, checks.FLOAT_DTYPES)
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"q is {q.dtype}, keys {keys.dtype}, values {values.dtype}: give all in one dtype"
        )
    if q.stride(2) != 1:
        raise ValueError("q needs a contiguous last dim: call .contiguous()")
    checks.check_contiguous(keys=keys, values=values)
    checks.check_paging(block_table, cache_seqlens, q.shape[0])
