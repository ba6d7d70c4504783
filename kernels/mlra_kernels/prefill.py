"""Attention of chunks of prompts to themselves and to all cached tokens before them.

The keys of a launch are gathered from the cache. Attention to more keys than one launch can hold is
computed in parts, each with a log-sum-exp, which are merged. Memory therefore holds the keys of one
launch, and never the `[chunk, history]` scores of a whole prompt. The project's engine and its vLLM
plugin both run prompts with these functions, by a plan that is made once per step (prompts.py).

Letters: T tokens of a step, c those of a bundle, t keys of a launch, n branches, g head groups,
h heads of the core, l latent dim, r RoPE dim, e size of a query or key, w size of a value, d_h and
d_v sizes of a head's keys (without RoPE) and values.
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
"""Most keys of a launch. Absorbed keys are as small as the cache's rows, so that the history of a
long prompt fits in one launch; expanded keys exist for every head."""
SCORE_NUMBERS = 1 << 26
"""Most scores that the torch path holds at a time."""
FLASH_MAX_DIM = 256


def runs_absorbed(nope_dim: int, latent_dim: int) -> bool:
    """Whether prompts attend to the latents themselves: if that costs no more FLOPs (l <= d_h)."""
    return latent_dim <= nope_dim


def keys_at_once(nope_dim: int, latent_dim: int) -> int:
    """Most keys of a launch of latent attention, for `plan_prompts`."""
    return ABSORBED_KEYS if runs_absorbed(nope_dim, latent_dim) else EXPANDED_KEYS


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, part: Part
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention of a part's sequences and its log-sum-exp.

    On a GPU in half precision there is one launch: of this project's kernels if the values are the
    first columns of the keys and the kernels take the sizes (Hopper), else of torch's flash
    attention. Otherwise torch computes in float32, one sequence after another.

    Args:
        q: `[s, heads, e]`.
        k: `[t, kv_heads, e]`.
        v: `[t, kv_heads, w]`; in absorbed form a view of the first w columns of k.
        part: which keys each query reads.

    Returns:
        Outputs `[s, heads, w]` in q's dtype, log-sum-exps `[s, heads]` float32.
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
    """Whether v is a view of the first columns of k."""
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
    """torch's FlashAttention-2, which aligns queries and keys at their ends and groups heads."""
    width = v.size(-1)
    if width < q.size(-1):
        # FlashAttention-2 needs values as wide as keys.
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
    """(Output, log-sum-exp) over two sets of keys, from those over each set."""
    outs = torch.stack((first[0], second[0]))
    return merged_all(outs, torch.stack((first[1].float(), second[1].float())))


def merged_all(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_states`: by its kernel for 16-bit states of 2^n numbers on a GPU, else in torch."""
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

    Absorbed if that costs no more FLOPs (l <= d_h), else with keys and values that are expanded
    for each launch.

    Args:
        q: `[T, h, d_h + r]`, rotated, of all chunks' tokens.
        layer: rows `[pages, page_size, n g l + r]` and, for FP8, scales `[pages, n g, page_size]`,
            both as in `latent_decode`.
        bundles: of all T rows, from `plan_prompts`.
        w_uk: `[h, d_h, n l]`.
        w_uv: `[h, n l, d_v]`, multiplied by the scale of the sum over branches.

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
    """Attention to some of a prompt's tokens, to be merged with the attention to the others.

    Args:
        q, layer, w_uk, w_uv: as in `prefill_latent`.
        bundles: of any rows of q; the other rows read no token, and get 0 and -inf.
        groups: the layer's head groups that the h heads read.

    Returns:
        States `[T, n, h, w]` in q's dtype, and log-sum-exps `[T, n, h]` float32. If
        `runs_absorbed`, w = l, and `sum_branches` gives the outputs; else w = d_v, and the sum over
        n gives them.
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
    """Yield (rows of q, states `[c, n, h, w]`, log-sum-exps `[c, n, h]`) of each bundle."""
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
    """Keys `[t, n h, d_h + r]` and values `[t, n h, d_v]` of a launch."""
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
    """Outputs of chunks whose tokens are already in a cache of grouped keys and values.

    Args:
        q: `[T, heads, dim]`, rotated.
        layer: `[2, pages, page_size, kv_heads, dim]`.
        bundles: of all T rows, planned for `EXPANDED_KEYS` keys at once.

    Returns:
        `[T, heads, dim]` in q's dtype.
    """
    return grouped_states(q, layer, bundles, softmax_scale)[0]


def grouped_states(
    q: Tensor,
    layer: Tensor,
    bundles: Sequence[Bundle],
    softmax_scale: float,
    groups: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """As `latent_states`, for a cache of grouped keys and values.

    Args:
        groups: the layer's key heads that q's heads read.

    Returns:
        Outputs `[T, heads, dim]` in q's dtype, log-sum-exps `[T, heads]` float32.
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
