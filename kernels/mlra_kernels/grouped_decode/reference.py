"""Plain torch reference of grouped-query decoding, fp32 inside, on any device.

Letters: b sequences, H query heads, K key/value heads, D head dim, t cached tokens.
"""

import torch
from torch import Tensor

from mlra_kernels import checks


def grouped_decode_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `ops.grouped_decode`."""
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
    page_size, kv_heads = keys.shape[1:3]
    read = checks.read_paging(block_table, cache_seqlens, page_size, keys.shape[0])
    for b, (length, pages) in enumerate(read):
        if length == 0:
            continue
        k, v = (x[pages].flatten(0, 1)[:length].float() for x in (keys, values))
        grouped = q[b].float().unflatten(0, (kv_heads, -1))  # [K, H / K, D]
        scores = torch.einsum("kjd,tkd->kjt", grouped, k) * softmax_scale
        lse[b] = scores.logsumexp(-1).flatten()
        out[b] = torch.einsum("kjt,tkd->kjd", scores.softmax(-1), v).flatten(0, 1).to(q.dtype)
    return out, lse
