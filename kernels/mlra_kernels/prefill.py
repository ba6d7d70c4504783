"""Attention of a prompt's chunk to all cached tokens before it and to itself.

The history is taken from the cache in blocks; each gives an output and a log-sum-exp, which are
merged, so memory holds one block of keys and never `[chunk, history]` scores of a whole prompt.
The project's engine and its vLLM plugin both run prompts through these functions.

Letters: c tokens of the chunk, t of a block, n branches, g head groups, h heads of the core,
l latent dim, r RoPE dim, e dims of a query or key, w dims of a value, d_h and d_v those of a head's
keys (without RoPE) and values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mlra_kernels.absorption import absorb_queries, sum_branches
from mlra_kernels.latent_attention import latent_attention_with_lse, misfit
from mlra_kernels.latent_decode import merge_states
from mlra_kernels.latent_decode.reference import merge_states_reference, split_cache

HISTORY_BLOCK = 16384
"""Cached tokens whose keys are assembled at a time."""
SCORE_NUMBERS = 1 << 26
"""Scores that the torch path holds at a time."""
FLASH_MAX_DIM = 256


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention and its log-sum-exp.

    On a GPU in half precision this project's kernels for values that are part of their keys where
    these take the sizes (Hopper), else flash attention (torch's own); else torch in float32.

    Args:
        q: `[c, heads, e]`; k: `[t, kv_heads, e]`; v: `[t, kv_heads, w]`, of which the absorbed
            form's are the first w columns of k.
        causal: query i sees keys up to `t - c + i`.

    Returns:
        `[c, heads, w]` in q's dtype and `[c, heads]` float32.
    """
    if _is_part(v, k) and _latent_kernels_take(q, v.size(-1)):
        out, lse = latent_attention_with_lse(
            q[:, None], k[:, None], v.size(-1), softmax_scale, causal=causal
        )
        return out[:, 0], lse[0].T
    if q.is_cuda and q.dtype != torch.float32 and q.size(-1) <= FLASH_MAX_DIM:
        return _flash(q, k, v, softmax_scale, causal)
    rows = max(1, SCORE_NUMBERS // (q.size(1) * k.size(0)))
    past = k.size(0) - q.size(0)
    parts = [
        _attend(part, k, v, softmax_scale, past + first if causal else None)
        for first, part in zip(range(0, q.size(0), rows), q.split(rows), strict=True)
    ]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _is_part(v: Tensor, k: Tensor) -> bool:
    """Whether v is the first columns of k, in memory."""
    return v.data_ptr() == k.data_ptr() and v.stride() == k.stride()


def _latent_kernels_take(q: Tensor, latent_dim: int) -> bool:
    half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    return half and misfit(latent_dim, q.size(-1) - latent_dim) is None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, past: int | None
) -> tuple[Tensor, Tensor]:
    groups = k.size(1)
    wide = q.float().unflatten(1, (groups, -1))
    scores = torch.einsum("cgje,tge->cgjt", wide, k.float()) * scale
    if past is not None:
        row = torch.arange(q.size(0), device=q.device)[:, None] + past
        future = torch.arange(k.size(0), device=q.device) > row
        scores = scores.masked_fill(future[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    out = torch.einsum("cgjt,tgw->cgjw", (scores - lse[..., None]).exp(), v.float())
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """torch's FlashAttention-2: queries and keys aligned at their ends, grouped heads native."""
    width = v.size(-1)
    if width < q.size(-1):
        # It wants values as wide as keys.
        v = k if _is_part(v, k) else torch.nn.functional.pad(v, (0, q.size(-1) - width))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q[None], k[None], v[None], None, None, q.size(0), k.size(0), 0.0, causal, False, scale=scale
    )
    return out[0, :, :, :width], lse[0].T[: q.size(0)]


def merged(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The attention over all blocks from each block's output and log-sum-exp."""
    if len(parts) == 1:
        return parts[0][0]
    outs = torch.stack([out for out, _ in parts])
    lses = torch.stack([lse.float() for _, lse in parts])
    if outs.is_cuda and outs.dtype != torch.float32 and outs.size(-1).bit_count() == 1:
        return merge_states(outs, lses)[0]
    return merge_states_reference(outs, lses)[0]


def blocks(start: int, c: int, page_size: int) -> Iterator[tuple[int, int, bool]]:
    """(first token, end, whether causal) of the history in blocks, then of the chunk itself."""
    size = max(page_size, HISTORY_BLOCK // page_size * page_size)
    for first in range(0, start, size):
        yield first, min(first + size, start), False
    yield start, start + c, True


def gather(data: Tensor, pages: Tensor, first: int, end: int) -> Tensor:
    """Rows `first:end` of a sequence from `[pages, page_size, ...]`."""
    page_size = data.size(1)
    low = first // page_size
    rows = data[pages[low : -(-end // page_size)]].flatten(0, 1)
    return rows[first - low * page_size : end - low * page_size]


def prefill_latent(
    q: Tensor,
    layer: tuple[Tensor, Tensor | None],
    pages: Tensor,
    start: int,
    *,
    w_uk: Tensor,
    w_uv: Tensor,
    rope_dim: int,
    branches: int,
    softmax_scale: float,
) -> Tensor:
    """Outputs of a chunk whose tokens are already in the cache, summed over branches.

    Absorbed where that costs no FLOPs (l <= d_h), else with keys and values expanded block by
    block.

    Args:
        q: `[c, h, d_h + r]`, rotated, of the tokens at `start` and after.
        layer: rows `[pages, page_size, n g l + r]` and, for FP8, scales `[pages, n g, page_size]`,
            both as in `latent_decode`.
        pages: `[P]` int64 of this sequence.
        start: tokens of the sequence in front of the chunk.
        w_uk: `[h, d_h, n l]`; w_uv: `[h, n l, d_v]`, times whatever scales the sum over branches.

    Returns:
        `[c, h, d_v]` in q's dtype.
    """
    c, h, _ = q.shape
    nope, l = w_uk.size(1), w_uk.size(2) // branches
    latents = split_cache(layer[0], rope_dim)[0].size(-1) // l
    absorbed = l <= nope
    if absorbed:
        head = absorb_queries(q[..., :nope], w_uk, branches)  # [c, n, h, l]
        shared = q[:, None, :, nope:].expand(-1, branches, -1, -1)
        query = torch.cat((head, shared), dim=-1).flatten(1, 2)
    else:
        query = q.repeat(1, branches, 1)  # [c, n h, d_h + r]

    def keys_values(first: int, end: int) -> tuple[Tensor, Tensor]:
        rows, k_rope = _rows(layer, pages, first, end, rope_dim, latents, q.dtype)
        if absorbed:
            key = torch.cat((rows, k_rope[:, None].expand(-1, latents, -1)), dim=-1)
            return key, key[..., :l]
        return _expand(rows, k_rope, w_uk, w_uv, branches)

    parts = []
    for first, end, causal in blocks(start, c, layer[0].size(1)):
        key, value = keys_values(first, end)
        out, lse = attention_with_lse(query, key, value, softmax_scale, causal)
        parts.append((out, lse))
    out = merged(parts)  # [c, n h, l or d_v]
    if absorbed:
        return sum_branches(out.view(c, branches, h, l), w_uv)
    return out.view(c, branches, h, -1).sum(1)


def _rows(
    layer: tuple[Tensor, Tensor | None],
    pages: Tensor,
    first: int,
    end: int,
    rope: int,
    latents: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Latents `[t, n g, l]` and RoPE keys `[t, r]` of cached tokens, in `dtype`."""
    data, scale = layer
    rows, k_rope = split_cache(gather(data, pages, first, end), rope)
    rows = rows.unflatten(-1, (latents, -1))
    if scale is not None:
        factors = gather(scale.transpose(1, 2), pages, first, end)
        rows = rows.float() * factors[..., None]
    return rows.to(dtype), k_rope.to(dtype)


def _expand(
    rows: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """Keys `[t, n h, d_h + r]` and values `[t, n h, d_v]` of a block (times w_uv's scale)."""
    t, latents, l = rows.shape
    h, nope, _ = w_uk.shape
    g = latents // n
    rows = rows.view(t, n, g, l)
    w_uk = w_uk.view(g, h // g, nope, n, l)
    w_uv = w_uv.view(g, h // g, n, l, -1)
    k_nope = torch.einsum("tngl,gjdnl->tngjd", rows, w_uk).reshape(t, n * h, nope)
    value = torch.einsum("tngl,gjnlv->tngjv", rows, w_uv).reshape(t, n * h, -1)
    key = torch.cat((k_nope, k_rope[:, None].expand(-1, n * h, -1)), dim=-1)
    return key, value


def prefill_grouped(
    q: Tensor, layer: Tensor, pages: Tensor, start: int, softmax_scale: float
) -> Tensor:
    """Outputs `[c, heads, dim]` of a chunk already in a grouped cache."""
    keys, values = layer
    parts = []
    for first, end, causal in blocks(start, q.size(0), keys.size(1)):
        k, v = (gather(x, pages, first, end) for x in (keys, values))
        parts.append(attention_with_lse(q, k, v, softmax_scale, causal))
    return merged(parts)
