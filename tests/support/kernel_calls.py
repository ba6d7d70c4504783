"""Draws calls of the kernels' public functions, right and wrong, with their expected results.

The expected results are float64, computed as each function's docstring says, one sequence and one
head at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

SCALARS = (None, "x", math.nan, math.inf, -math.inf, -1, 0, 1, 3, 2**40, 0.5, True, [])
DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int32,
    torch.int64, torch.bool,
)  # fmt: skip
EXTREMES = (-(2**31), -1, 10**6, 2**31 - 1)
SPOILS = ("wide", "steps", "turned", "dtype", "device", "shorter", "empty", "longer", "flat",
          "deeper", "none", "numbers")  # fmt: skip


class Call(NamedTuple):
    """A function, right arguments, and a function that returns the expected results for any
    accepted arguments."""

    function: Callable
    arguments: dict[str, Any]
    expected: Callable[..., tuple[Tensor, ...]]


def spoil(draw: Callable, value: Any) -> Any:
    """Another value for an argument: the same numbers in another layout, or a wrong value."""
    if value is None:
        return torch.zeros(2)
    if not isinstance(value, Tensor):
        return draw(st.sampled_from(SCALARS))
    dim = draw(st.integers(0, value.dim() - 1))
    kind = draw(st.sampled_from(SPOILS))
    if kind == "wide":
        return torch.cat((value, value), -1)[..., : value.shape[-1]]
    if kind == "steps":
        return value.repeat_interleave(2, dim)[(slice(None),) * dim + (slice(None, None, 2),)]
    if kind == "turned":
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "dtype":
        return value.to(draw(st.sampled_from(DTYPES)))
    if kind == "device":
        return value.to("meta")
    if kind in ("shorter", "empty"):
        return value.narrow(dim, 0, max(value.shape[dim] - 1, 0) if kind == "shorter" else 0)
    if kind == "longer":
        return torch.cat((value, value), dim)
    if kind == "flat":
        return value.flatten()
    if kind == "deeper":
        return value[None]
    if kind == "numbers" and not value.is_floating_point():
        changed = value.clone().flatten()
        if len(changed):
            changed[draw(st.integers(0, len(changed) - 1))] = draw(st.sampled_from(EXTREMES))
        return changed.view(value.shape)
    return None


@st.composite
def spoilt_arguments(draw: Callable, call: Call) -> dict[str, Any]:
    """The arguments of a call, up to two of them spoilt."""
    arguments = dict(call.arguments)
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(arguments)))
        arguments[name] = spoil(draw, arguments[name])
    return arguments


def normals(draw: Callable) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    return normal


HALVES = st.sampled_from((torch.float32, torch.float16))
COUNTS = st.integers(1, 3)


def _paging(draw: Callable, batch: int, page: int) -> tuple[int, Tensor, Tensor]:
    """Number of pages of a cache, a block table (unused entries are huge), and lengths."""
    most = draw(COUNTS)
    lengths = [draw(st.integers(0, most * page)) for _ in range(batch)]
    pages = batch * most + 1
    table = torch.randperm(pages)[: batch * most].view(batch, most)
    for b, length in enumerate(lengths):
        table[b, -(-length // page) :] = 2**31 - 1
    return pages, table.int(), torch.tensor(lengths, dtype=torch.int32)


def _rows(cache: Tensor, pages: Tensor, length: int) -> Tensor | None:
    """The first `length` rows of the pages, in float64; None if the pages hold fewer.

    For a page outside the cache, the nearest page counts.
    """
    count, page = cache.shape[:2]
    if not 0 <= length <= len(pages) * page:
        return None
    at = [min(max(int(pages[t // page]), 0), count - 1) * page + t % page for t in range(length)]
    return cache.flatten(0, 1)[at].double()


@st.composite
def latent_decode_calls(draw: Callable) -> Call:
    """`latent_decode` in 16 and 32 bits."""
    from mlra_kernels.latent_decode import latent_decode

    normal, dtype = normals(draw), draw(HALVES)
    batch, q_len, groups, branches, heads = (draw(COUNTS) for _ in range(5))
    page = draw(st.sampled_from((16, 48)))
    pages, table, lengths = _paging(draw, batch, page)
    latents = groups * branches
    arguments = {
        "q_absorbed": normal(batch, q_len, latents, heads, 64, dtype=dtype),
        "q_rope": normal(batch, q_len, groups * heads, 32, dtype=dtype),
        "cache": normal(pages, page, latents * 64 + 32, dtype=dtype),
        "block_table": table,
        "cache_seqlens": lengths,
        "softmax_scale": 0.1,
        "num_branches": branches,
        "cache_scale": None,
    }
    return Call(latent_decode, arguments, expected_decode)


def expected_decode(
    q_absorbed, q_rope, cache, block_table, cache_seqlens, softmax_scale, num_branches, cache_scale
):
    """Output and log-sum-exp."""
    assert cache_scale is None
    batch, q_len, latents, heads, dim = q_absorbed.shape
    assert cache.shape[2] == latents * dim + q_rope.shape[3]
    out = torch.zeros(q_absorbed.shape, dtype=torch.float64)
    lse = torch.full(q_absorbed.shape[:4], -math.inf, dtype=torch.float64)
    for b in range(batch):
        rows = _rows(cache, block_table[b], int(cache_seqlens[b]))
        if rows is None:
            out[b], lse[b] = math.nan, math.nan
        for i in range(0 if rows is None else q_len):
            seen = rows[: max(0, len(rows) - q_len + i + 1)]
            for latent in range(latents if len(seen) else 0):
                c, k = seen[:, latent * dim : (latent + 1) * dim], seen[:, latents * dim :]
                first = latent % (latents // num_branches) * heads
                x = q_absorbed[b, i, latent].double() @ c.T
                x = (x + q_rope[b, i, first : first + heads].double() @ k.T) * softmax_scale
                lse[b, i, latent], out[b, i, latent] = x.logsumexp(-1), x.softmax(-1) @ c
    return out, lse


@st.composite
def grouped_decode_calls(draw: Callable) -> Call:
    """`grouped_decode`."""
    from mlra_kernels.grouped_decode import grouped_decode

    normal, dtype = normals(draw), draw(HALVES)
    batch, kv_heads, group = (draw(COUNTS) for _ in range(3))
    pages, table, lengths = _paging(draw, batch, 64)
    arguments = {
        "q": normal(batch, kv_heads * group, 16, dtype=dtype),
        "keys": normal(pages, 64, kv_heads, 16, dtype=dtype),
        "values": normal(pages, 64, kv_heads, 16, dtype=dtype),
        "block_table": table,
        "cache_seqlens": lengths,
        "softmax_scale": 0.3,
    }

    def decode(**arguments):
        out, lse = grouped_decode(**arguments)
        # The log-sum-exp of an impossible length is unspecified; the output is NaN.
        return out, torch.where(out[..., 0].isnan(), math.nan, lse)

    return Call(decode, arguments, expected_grouped)


def expected_grouped(q, keys, values, block_table, cache_seqlens, softmax_scale):
    """Output, lse."""
    batch, heads, dim = q.shape
    out, group = torch.zeros(batch, heads, dim, dtype=torch.float64), heads // keys.shape[2]
    lse = torch.full((batch, heads), -math.inf, dtype=torch.float64)
    assert group * keys.shape[2] == heads and keys.shape == values.shape
    for b, length in enumerate(cache_seqlens.tolist()):
        k, v = (_rows(x, block_table[b], length) for x in (keys, values))
        if k is None:
            out[b], lse[b] = math.nan, math.nan
        for head in range(heads if length and k is not None else 0):
            x = k[:, head // group] @ q[b, head].double() * softmax_scale
            out[b, head], lse[b, head] = x.softmax(0) @ v[:, head // group], x.logsumexp(0)
    return out, lse


@st.composite
def append_calls(draw: Callable) -> Call:
    """`latent_cache_append`; the call returns the cache."""
    from mlra_kernels.latent_decode import latent_cache_append

    def append(**arguments):
        latent_cache_append(**arguments)
        return arguments["cache"]

    normal, dtype = normals(draw), draw(HALVES)
    tokens, latents, pages = draw(st.integers(0, 5)), draw(COUNTS), draw(COUNTS)
    slots = torch.randperm(pages * 16)[:tokens]
    slots[: draw(st.integers(0, 1))] = -1
    index = draw(st.sampled_from((torch.int32, torch.int64)))
    angles = normal(9, 16)
    arguments = {
        "kv_down": normal(tokens, latents * 64 + 32, dtype=dtype),
        "norm_weight": normal(latents, 64),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.randint(0, 9, (tokens,), dtype=index),
        "slot_mapping": slots.to(index),
        "cache": normal(pages, 16, latents * 64 + 32, dtype=dtype),
        "latent_scale": 1.5,
        "norm_eps": 1e-6,
        "cache_scale": None,
    }
    return Call(append, arguments, expected_append)


def expected_append(
    kv_down, norm_weight, cos, sin, positions, slot_mapping, cache, latent_scale, norm_eps,
    cache_scale,
):  # fmt: skip
    """The cache with normed latents and rotated keys; slots outside the cache are skipped."""
    assert cache_scale is None
    cache, (latents, dim) = cache.double(), norm_weight.shape
    rows = cache.view(-1, cache.shape[2])
    for x, position, slot in zip(
        kv_down.double(), positions.tolist(), slot_mapping.tolist(), strict=True
    ):
        if not 0 <= slot < len(rows):
            continue
        c = x[: latents * dim].view(latents, dim)
        c = c / (c.square().mean(-1, keepdim=True) + norm_eps).sqrt()
        first, second = x[latents * dim :].chunk(2)
        known = 0 <= position < len(cos)
        turn = [t[position].double() if known else first * math.nan for t in (cos, sin)]
        key = (first * turn[0] - second * turn[1], second * turn[0] + first * turn[1])
        c = (c * norm_weight.double() * latent_scale).flatten()
        rows[slot] = torch.cat((c, *key))
    return (cache,)


@st.composite
def merge_calls(draw: Callable) -> Call:
    """`merge_states`, with states of no keys among the states."""
    from mlra_kernels.latent_decode import merge_states

    normal = normals(draw)
    shape = [draw(COUNTS) for _ in range(draw(COUNTS))]
    lses = normal(*shape)
    lses[torch.rand(shape) < 0.3] = -math.inf
    outs = normal(*shape, draw(st.sampled_from((1, 20))), dtype=draw(HALVES))
    return Call(merge_states, {"outs": outs, "lses": lses}, expected_merge)


def expected_merge(outs, lses):
    """Output and log-sum-exp."""
    weights = lses.double().softmax(0).nan_to_num(0.0)
    return (outs.double() * weights[..., None]).sum(0), lses.double().logsumexp(0)
