"""Pure torch references of every operation, fp32 inside; they run on any device.

Letters: b sequences, q query tokens per sequence, L latent heads in the cache, n branches,
G = L / n head groups, j heads per latent head, D latent dim, R RoPE dim, t cached tokens.
"""

import torch
from torch import Tensor

from mlra_kernels import checks

FP8_MAX = 448.0  # largest finite e4m3 value
FP8_DTYPE = torch.float8_e4m3fn


def rope_tables(
    max_positions: int, rope_dim: int, *, base: float = 10000.0, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) of `position * base^(-2i/R)`, each `[max_positions, R / 2]` fp32.

    Raises:
        ValueError: a size that is no positive even integer or a base that is no positive number.
    """
    checks.check_integer("max_positions", max_positions, 1)
    checks.check_integer("rope_dim", rope_dim, 2)
    checks.check_number("base", base, positive=True)
    if rope_dim % 2:
        raise ValueError(f"rope_dim is {rope_dim}: RoPE turns pairs, make it even")
    exponents = torch.arange(0, rope_dim, 2, dtype=torch.float64) / rope_dim
    angles = torch.arange(max_positions, dtype=torch.float64)[:, None] * base**-exponents
    return angles.cos().float().to(device), angles.sin().float().to(device)


def split_cache(cache: Tensor, rope_dim: int) -> tuple[Tensor, Tensor]:
    """Split a paged cache into views of its latents and its RoPE keys, without a copy.

    `cache` is `[..., L * D + R]` in fp16, bf16 or fp32; or, in FP8, `[..., L * D + 2 * R]` e4m3,
    where the last `2 * R` bytes of a row hold R bf16 numbers. R may be 0 (a model without RoPE).

    Returns:
        latents `[..., L * D]` and RoPE keys `[..., R]`, in bf16 for an FP8 cache.

    Raises:
        ValueError: a row does not hold the RoPE key and a latent, or cannot be split in place.
    """
    checks.check_tensors(cache=cache)
    if cache.dim() == 0:
        raise ValueError("cache has no dims: give [pages, page_size, width]")
    checks.check_integer("rope_dim", rope_dim, 0)
    rope_columns = rope_dim * (2 if cache.dtype == FP8_DTYPE else 1)
    if rope_columns >= cache.shape[-1]:
        raise ValueError(
            f"cache rows hold {cache.shape[-1]} elements: a RoPE key of {rope_dim} takes "
            f"{rope_columns} and leaves no latent"
        )
    if cache.dtype != FP8_DTYPE:
        return cache.split((cache.shape[-1] - rope_dim, rope_dim), -1)
    *strides, step = cache.stride()
    if step != 1 or any(n % 2 for n in (*strides, cache.storage_offset(), cache.shape[-1])):
        raise ValueError(
            f"FP8 cache rows of {cache.shape[-1]} bytes begin at byte {cache.storage_offset()} and "
            f"have strides {cache.stride()}: make the last dim contiguous and all others even, as"
            " the rows hold bf16 numbers"
        )
    latents, rope_bytes = cache.split((cache.shape[-1] - rope_columns, rope_columns), -1)
    return latents, rope_bytes.view(torch.uint8).view(torch.bfloat16)


def _weights(parts: Tensor, total: Tensor) -> Tensor:
    """exp(parts - total), and 0 where the total is empty (-inf); NaN and +inf give NaN."""
    return torch.where(total == -torch.inf, 0.0, (parts - total).exp())


def latent_decode_reference(
    q_absorbed: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    num_branches: int,
    cache_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of L latent heads over one paged cache; arguments as in `ops.latent_decode`.

    For query token i of a sequence of length s (the q new tokens included), latent l and head j,
    over the tokens t <= s - q + i:
        p_t = softmax_t(softmax_scale * (q_absorbed . c_t,l + q_rope . k_t)),  out = sum_t p_t c_t,l

    Returns:
        out `[b, q, L, j, D]` in q's dtype and the natural log-sum-exp `[b, q, L, j]` fp32; a row
        that sees no token gives 0 and -inf.
    """
    _, q_len, num_latents, heads, latent_dim = q_absorbed.shape
    page_size, groups = cache.shape[1], num_latents // num_branches
    q_c = q_absorbed.float()
    # q_r: [b, q, L, j, R]; latent l is attended to by the heads of group l mod G
    q_r = q_rope.float().unflatten(2, (groups, heads)).repeat(1, 1, num_branches, 1, 1)
    latents, rope_keys = split_cache(cache, q_rope.shape[-1])
    out = torch.zeros_like(q_c)
    lse = torch.full(q_c.shape[:-1], -torch.inf, device=q_c.device)
    read = checks.read_paging(block_table, cache_seqlens, page_size, cache.shape[0])
    for b, (length, pages) in enumerate(read):
        if length == 0:
            continue
        c = latents[pages].flatten(0, 1)[:length].float().unflatten(1, (num_latents, latent_dim))
        if cache_scale is not None:
            scale = cache_scale[pages].transpose(1, 2).flatten(0, 1)[:length]  # [t, L]
            c = c * scale.float()[..., None]
        k_r = rope_keys[pages].flatten(0, 1)[:length].float()  # [t, R]
        scores = torch.einsum("qljd,tld->qljt", q_c[b], c)
        scores = (scores + torch.einsum("qljr,tr->qljt", q_r[b], k_r)) * softmax_scale
        last_seen = length - q_len + torch.arange(q_len, device=c.device)
        hidden = torch.arange(length, device=c.device)[None, :] > last_seen[:, None]  # [q, t]
        scores = scores.masked_fill(hidden[:, None, None, :], -torch.inf)
        lse[b] = torch.logsumexp(scores, dim=-1)
        probs = _weights(scores, lse[b][..., None])
        out[b] = torch.einsum("qljt,tld->qljd", probs, c)
    return out.to(q_absorbed.dtype), lse


def merge_states_reference(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of tokens; arguments as in `ops.merge_states`.

    lse = log sum_s exp(lse_s),  out = sum_s exp(lse_s - lse) out_s;  0 and -inf if all are empty.
    """
    lse = torch.logsumexp(lses.float(), dim=0)
    weights = _weights(lses.float(), lse)
    # `outs` may hold anything for an empty set, even NaN, and must not count.
    parts = torch.where(weights[..., None] == 0, 0.0, outs.float())
    return (weights[..., None] * parts).sum(0).to(outs.dtype), lse


def latent_cache_append_reference(
    kv_down: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cache: Tensor,
    cache_scale: Tensor | None,
    latent_scale: float,
    norm_eps: float,
) -> None:
    """Norm, scale, rotate, quantise and write; arguments as in `ops.latent_cache_append`.

    c_l = RMSNorm_l(x_l) * latent_scale;  (k_i, k_{i+R/2}) = half-split rotation of the RoPE key.
    """
    num_latents, latent_dim = norm_weight.shape
    written = (slot_mapping >= 0) & (slot_mapping < cache.shape[0] * cache.shape[1])
    slots, x = slot_mapping[written].long(), kv_down[written].float()
    page, offset = slots // cache.shape[1], slots % cache.shape[1]
    c = x[:, : num_latents * latent_dim].unflatten(1, (num_latents, latent_dim))
    c = c * torch.rsqrt(c.square().mean(-1, keepdim=True) + norm_eps)
    c = c * norm_weight.float() * latent_scale  # [tokens, L, D]
    first, second = x[:, num_latents * latent_dim :].chunk(2, dim=-1)
    at = positions[written].long()
    known = ((at >= 0) & (at < cos.shape[0]))[:, None]
    at = torch.where(known[:, 0], at, 0)
    cos_t, sin_t = (torch.where(known, table[at].float(), torch.nan) for table in (cos, sin))
    k_r = torch.cat([first * cos_t - second * sin_t, second * cos_t + first * sin_t], dim=-1)
    latents, rope_keys = split_cache(cache, k_r.shape[-1])
    if cache_scale is None:
        latents[page, offset] = c.flatten(1).to(cache.dtype)
    else:
        scale = (c.abs().amax(-1) / FP8_MAX).clamp_min(1e-12)  # [tokens, L]
        cache_scale[page, :, offset] = scale
        bits = (c / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE).view(torch.uint8)
        latents.view(torch.uint8)[page, offset] = bits.flatten(1)
    rope_keys[page, offset] = k_r.to(rope_keys.dtype)
