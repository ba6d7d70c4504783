"""Public operation of grouped-query decoding: checks, launch, merging of a sequence's parts."""

import math

import torch
import triton
from torch import Tensor

from mlra_kernels.grouped_decode.kernel import grouped_decode_kernel
from mlra_kernels.grouped_decode.reference import grouped_decode_reference
from mlra_kernels.latent_decode.ops import merge_states

BACKENDS = ("triton", "reference")
MIN_TOKENS = 256  # fewest tokens worth a part of their own


def grouped_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    *,
    backend: str = "triton",
) -> Tensor:
    """Attend from one new token a sequence to a paged cache of keys and values.

    Args:
        q: `[b, H, D]` bf16 or fp16, rotated; query head i reads key head `i // (H / K)`.
        keys, values: `[pages, page_size, K, D]`, contiguous, in q's dtype; page_size a multiple of
            64 for 'triton'.
        block_table: `[b, max_pages]` int32; entries past a sequence's length are not read.
        cache_seqlens: `[b]` int32 lengths, the new token included; 0 gives 0.
        softmax_scale: factor of the scores.
        backend: 'triton' (CUDA) or 'reference' (pure torch).

    Returns:
        `[b, H, D]`.

    Raises:
        ValueError: an argument does not fit; the message names the value and the fix.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: choose one of {BACKENDS}")
    _, page_size, kv_heads, dim = keys.shape
    if q.shape[1] % kv_heads or q.shape[2] != dim or values.shape != keys.shape:
        raise ValueError(
            f"q is {tuple(q.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}: give"
            " [b, H, D] and twice [pages, page_size, K, D] with K dividing H"
        )
    if backend == "reference":
        return grouped_decode_reference(q, keys, values, block_table, cache_seqlens, softmax_scale)
    if page_size % 64 or dim & (dim - 1):
        raise ValueError(
            f"page size is {page_size}, head dim {dim}: backend='triton' takes pages of a multiple"
            " of 64 and a power of two"
        )
    b, heads, _ = q.shape
    multiprocessors = 4
    if q.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    longest = block_table.shape[1] * page_size
    parts = max(1, 2 * multiprocessors // (b * kv_heads))
    parts = min(parts, -(-longest // MIN_TOKENS))
    out = torch.empty(parts, b, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(parts, b, heads, dtype=torch.float32, device=q.device)
    grouped_decode_kernel[(parts, kv_heads, b)](
        q, keys, values, block_table, cache_seqlens, out, lse, softmax_scale * math.log2(math.e),
        q.stride(0), q.stride(1), block_table.stride(0),
        HEADS=heads, KV_HEADS=kv_heads, J=heads // kv_heads, M=max(16, triton.next_power_of_2(
            heads // kv_heads)), N=64, D=dim, PAGE=page_size, MIN_TOKENS=MIN_TOKENS,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out[0] if parts == 1 else merge_states(out, lse)[0]
