"""Attention of prompts' chunks to all cached tokens before them and to themselves.

The keys of a launch are gathered from the cache; what one launch cannot hold is computed in parts,
each with a log-sum-exp, which are merged, so memory holds the keys of one launch and never
`[chunk, history]` scores of a whole prompt. The project's engine and its vLLM plugin both run
prompts through these functions, by a plan that is made once a step (prompts.py).

Letters: T tokens of a step, c those of a bundle, t keys of a launch, n branches, g head groups,
h heads of the core, l latent dim, r RoPE dim, e dims of a query or key, w dims of a value, d_h and
d_v those of a head's keys (without RoPE) and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mlra_kernels.absorption import absorb_queries, sum_branches
from mlra_kernels.latent_attention import latent_attention_with_lse, misfit
from mlra_kernels.latent_decode import merge_states
from mlra_kernels.latent_decode.reference import merge_states_reference, split_cache
from mlra_kernels.prompts import Bundle, Part

ABSORBED_KEYS, EXPANDED_KEYS = 131072, 16384
"""Keys of a launch. Absorbed ones are as small as the cache's rows, so a long prompt's history
fits in one; expanded ones are of every head."""
SCORE_NUMBERS = 1 << 26
"""Scores that the torch path holds at a time."""
FLASH_MAX_DIM = 256


def runs_absorbed(nope_dim: int, latent_dim: int) -> bool:
    """Whether prompts attend to latents as they are: where that costs no FLOPs (l <= d_h)."""
    return latent_dim <= nope_dim


def keys_at_once(nope_dim: int, latent_dim: int) -> int:
    """Keys of a launch of latent attention, for `plan_prompts`."""
    return ABSORBED_KEYS if runs_absorbed(nope_dim, latent_dim) else EXPANDED_KEYS


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, part: Part
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention of a part's sequences and its log-sum-exp.

    On a GPU in half precision this project's kernels for values that are part of their keys where
    these take the sizes (Hopper), else flash attention (torch's own), in one launch; else torch in
    float32, one sequence after another.

    Args:
        q: `[s, heads, e]`; k: `[t, kv_heads, e]`; v: `[t, kv_heads, w]`, of which the absorbed
            form's are the first w columns of k.
        part: which of them each query reads.

    Returns:
        `[s, heads, w]` in q's dtype and `[s, heads]` float32.
    """
    if _is_part(v, k) and _latent_kernels_take(q, v.size(-1)):
        out, lse = latent_attention_with_lse(
            q[:, None],
            k[:, None],
            v.size(-1),
            softmax_scale,
            causal=part.causal,
            **part.reads,
        )
        return out[:, 0], lse[0].T
    if q.is_cuda and q.dtype != torch.float32 and q.size(-1) <= FLASH_MAX_DIM:
        return _flash(q, k, v, softmax_scale, part)
    outs, lses = [], []
    sequences = zip(q.split(part.queries), k.split(part.keys), v.split(part.keys), strict=True)
    for queries, keys, values in sequences:
        # Row i of the sequence sees keys up to past + i.
        past = keys.size(0) - queries.size(0)
        rows = max(1, SCORE_NUMBERS // (queries.size(1) * keys.size(0)))
        for first, some in zip(range(0, queries.size(0), rows), queries.split(rows), strict=True):
            seen = past + first if part.causal else None
            out, lse = _attend(some, keys, values, softmax_scale, seen)
            outs.append(out)
            lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


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


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, part: Part) -> tuple[Tensor, Tensor]:
    """torch's FlashAttention-2: queries and keys aligned at their ends, grouped heads native."""
    width = v.size(-1)
    if width < q.size(-1):
        # It wants values as wide as keys.
        v = k if _is_part(v, k) else torch.nn.functional.pad(v, (0, q.size(-1) - width))
    run = torch.ops.aten._flash_attention_forward
    longest = max(part.queries), max(part.keys)
    if part.offsets is None:
        out, lse, *_ = run(
            q[None], k[None], v[None], None, None, *longest, 0.0, part.causal, False, scale=scale
        )
        out, lse = out[0], lse[0]
    else:
        out, lse, *_ = run(q, k, v, *part.offsets, *longest, 0.0, part.causal, False, scale=scale)
    return out[..., :width], lse.T[: q.size(0)]


def merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over both sets of keys from each one's output and log-sum-exp."""
    outs = torch.stack((first[0], second[0]))
    return merged_all(outs, torch.stack((first[1].float(), second[1].float())))


def merged_all(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_states`, by its kernel where that takes the arguments."""
    if outs.is_cuda and outs.dtype != torch.float32 and outs.size(-1).bit_count() == 1:
        return merge_states(outs, lses)
    return merge_states_reference(outs, lses)


def _attended(
    q: Tensor, bundle: Bundle, keys_values: Callable[[Tensor], tuple[Tensor, Tensor]], scale: float
) -> tuple[Tensor, Tensor]:
    """`[c, heads, w]` and log-sum-exp `[c, heads]` of a bundle's queries, over all its parts."""
    state = None
    for part in bundle.parts:
        found = attention_with_lse(q, *keys_values(part.slots), scale, part)
        state = found if state is None else merged(state, found)
    return state


def prefill_latent(
    q: Tensor,
    layer: tuple[Tensor, Tensor | None],
    bundles: Sequence[Bundle],
    *,
    w_uk: Tensor,
    w_uv: Tensor,
    rope_dim: int,
    branches: int,
    softmax_scale: float,
) -> Tensor:
    """Outputs of chunks whose tokens are already in the cache, summed over branches.

    Absorbed where that costs no FLOPs (l <= d_h), else with keys and values expanded launch by
    launch.

    Args:
        q: `[T, h, d_h + r]`, rotated, of all chunks' tokens.
        layer: rows `[pages, page_size, n g l + r]` and, for FP8, scales `[pages, n g, page_size]`,
            both as in `latent_decode`.
        bundles: of all T rows, from `plan_prompts`.
        w_uk: `[h, d_h, n l]`; w_uv: `[h, n l, d_v]`, times whatever scales the sum over branches.

    Returns:
        `[T, h, d_v]` in q's dtype.
    """
    absorbed = runs_absorbed(w_uk.size(1), w_uk.size(2) // branches)
    result = q.new_empty(q.size(0), w_uk.size(0), w_uv.size(2))
    states = _latent_states(q, layer, bundles, w_uk, w_uv, rope_dim, branches, softmax_scale)
    for rows, out, _ in states:
        result[rows] = sum_branches(out, w_uv) if absorbed else out.sum(1)
    return result


def latent_states(
    q: Tensor,
    layer: tuple[Tensor, Tensor | None],
    bundles: Sequence[Bundle],
    *,
    w_uk: Tensor,
    w_uv: Tensor,
    rope_dim: int,
    branches: int,
    softmax_scale: float,
    groups: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Attention to some of a prompt's tokens, to be merged with that to the others.

    Args:
        q, layer, w_uk, w_uv: as in `prefill_latent`.
        bundles: of any rows of q; the other rows see no token and get 0 and -inf.
        groups: the layer's head groups that the h heads read.

    Returns:
        `[T, n, h, w]` in q's dtype, w = l where `runs_absorbed` (`sum_branches` makes outputs of
        it), else d_v (the sum over n does); and the log-sum-exp `[T, n, h]` float32.
    """
    absorbed = runs_absorbed(w_uk.size(1), w_uk.size(2) // branches)
    width = w_uk.size(2) // branches if absorbed else w_uv.size(2)
    out = q.new_zeros(q.size(0), branches, w_uk.size(0), width)
    lse = torch.full(out.shape[:-1], -torch.inf, device=q.device)
    states = _latent_states(
        q, layer, bundles, w_uk, w_uv, rope_dim, branches, softmax_scale, groups
    )
    for rows, found, found_lse in states:
        out[rows], lse[rows] = found, found_lse
    return out, lse


def _latent_states(
    q: Tensor,
    layer: tuple[Tensor, Tensor | None],
    bundles: Sequence[Bundle],
    w_uk: Tensor,
    w_uv: Tensor,
    rope_dim: int,
    branches: int,
    softmax_scale: float,
    groups: slice = slice(None),
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of q, their `[c, n, h, w]` and log-sum-exp `[c, n, h]`, bundle by bundle."""
    h, nope, l = w_uk.size(0), w_uk.size(1), w_uk.size(2) // branches
    latents = split_cache(layer[0], rope_dim)[0].size(-1) // l
    absorbed = runs_absorbed(nope, l)

    def keys_values(slots: Tensor) -> tuple[Tensor, Tensor]:
        rows, k_rope = _rows(layer, slots, rope_dim, latents, q.dtype)
        rows = rows.unflatten(1, (branches, -1))[:, :, groups].flatten(1, 2)
        if absorbed:
            key = torch.cat((rows, k_rope[:, None].expand(-1, rows.size(1), -1)), dim=-1)
            return key, key[..., :l]
        return _expand(rows, k_rope, w_uk, w_uv, branches)

    for bundle in bundles:
        own = q[bundle.rows]
        if absorbed:
            head = absorb_queries(own[..., :nope], w_uk, branches)  # [c, n, h, l]
            shared = own[:, None, :, nope:].expand(-1, branches, -1, -1)
            query = torch.cat((head, shared), dim=-1).flatten(1, 2)
            del head
        else:
            query = own.repeat(1, branches, 1)  # [c, n h, d_h + r]
        out, lse = _attended(query, bundle, keys_values, softmax_scale)  # [c, n h, l or d_v]
        yield bundle.rows, out.unflatten(1, (branches, h)), lse.unflatten(1, (branches, h))


def _rows(
    layer: tuple[Tensor, Tensor | None],
    slots: Tensor,
    rope: int,
    latents: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Latents `[t, n g, l]` and RoPE keys `[t, r]` of cached tokens, in `dtype`."""
    data, scale = layer
    rows, k_rope = split_cache(_gather(data, slots), rope)
    rows = rows.unflatten(-1, (latents, -1))
    if scale is not None:
        page_size = data.size(1)
        factors = scale.transpose(1, 2)[slots // page_size, slots % page_size]  # [t, n g]
        rows = rows.float() * factors[..., None]
    return rows.to(dtype), k_rope.to(dtype)


def _gather(data: Tensor, slots: Tensor) -> Tensor:
    """Rows `[t, ...]` of `[pages, page_size, ...]`."""
    return data.flatten(0, 1)[slots]


def _expand(
    rows: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """Keys `[t, n h, d_h + r]` and values `[t, n h, d_v]` of a launch (times w_uv's scale)."""
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
    q: Tensor, layer: Tensor, bundles: Sequence[Bundle], softmax_scale: float
) -> Tensor:
    """Outputs `[T, heads, dim]` of chunks already in a grouped cache `[2, pages, page_size, ...]`.

    `bundles` are of `EXPANDED_KEYS` keys at once.
    """
    return grouped_states(q, layer, bundles, softmax_scale)[0]


def grouped_states(
    q: Tensor,
    layer: Tensor,
    bundles: Sequence[Bundle],
    softmax_scale: float,
    groups: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """As `latent_states`, of a grouped cache: `[T, heads, dim]` and `[T, heads]` float32.

    `groups` are the layer's key heads that q's heads read.
    """
    out, lse = torch.zeros_like(q), torch.full(q.shape[:-1], -torch.inf, device=q.device)
    for bundle in bundles:
        out[bundle.rows], lse[bundle.rows] = _attended(
            q[bundle.rows],
            bundle,
            lambda slots: tuple(_gather(part, slots)[:, groups] for part in layer),
            softmax_scale,
        )
    return out, lse
