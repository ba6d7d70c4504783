"""Draws calls of the kernels' other functions, with their expected results, as kernel_calls.py
does: tables, key ranges, and the elementwise and projection passes of decoding and training.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from support.kernel_calls import COUNTS, HALVES, Call, normals


@st.composite
def table_calls(draw: Callable) -> Call:
    """`rope_tables`."""
    from mlra_kernels.latent_decode import rope_tables

    arguments = {"max_positions": draw(COUNTS), "rope_dim": 2 * draw(COUNTS), "base": 100.0}
    return Call(rope_tables, arguments, expected_tables)


def expected_tables(max_positions, rope_dim, base):
    """Cosines and sines."""
    angles = [
        [position * base ** (-2 * i / rope_dim) for i in range(rope_dim // 2)]
        for position in range(max_positions)
    ]
    angles = torch.tensor(angles, dtype=torch.float64)
    return angles.cos(), angles.sin()


@st.composite
def split_calls(draw: Callable) -> Call:
    """`split_cache`, FP8 too."""
    from mlra_kernels.latent_decode.reference import split_cache

    dtype = draw(st.sampled_from((torch.float16, torch.float8_e4m3fn)))
    cache = normals(draw)(draw(COUNTS), 16, 96, dtype=dtype)
    return Call(split_cache, {"cache": cache, "rope_dim": 2 * draw(COUNTS)}, expected_split)


def expected_split(cache, rope_dim):
    """Latents and RoPE keys."""
    columns = rope_dim * (2 if cache.dtype == torch.float8_e4m3fn else 1)
    assert 0 <= columns < cache.shape[-1]
    latents, key = (cache[..., part] for part in (slice(-columns or None), slice(-columns, None)))
    if not columns:
        key = cache[..., :0]
    if cache.dtype == torch.float8_e4m3fn:
        key = key.contiguous().view(torch.uint8).view(torch.bfloat16)
    return latents.double(), key.double()


@st.composite
def span_calls(draw: Callable) -> Call:
    """`key_ranges` of spans, most of them in order."""
    from mlra_kernels.latent_attention import key_ranges

    spans, end, opened = [], 0, 0
    for _ in range(draw(COUNTS)):
        count, more = draw(COUNTS), draw(st.integers(-1, 3))
        spans.append((end, end + count, opened, opened + count + more))
        end, opened = end + count, opened + draw(st.integers(-1, 4))
    return Call(key_ranges, {"spans": spans}, expected_ranges)


def expected_ranges(spans):
    """First and last key of each query; neither sequence may fall."""
    rows = [(start, stop - (b - i)) for a, b, start, stop in spans for i in range(a, b)]
    first, last = torch.tensor(rows, dtype=torch.float64).T
    assert (first.diff() >= 0).all() and (last.diff() >= 0).all() and (first <= last).all()
    return (torch.stack((first, last)),)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE of the last dim."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@st.composite
def decoder_calls(draw: Callable) -> Call:
    """`add_rms_norm`, `silu_mul` and `rotate_heads`."""
    from mlra_kernels import decoder

    normal, dtype, tokens, heads = normals(draw), draw(HALVES), draw(COUNTS), draw(COUNTS)
    name = draw(st.sampled_from(("add_rms_norm", "silu_mul", "rotate_heads")))
    if name == "silu_mul":
        return Call(decoder.silu_mul, {"gate_up": normal(tokens, 14, dtype=dtype)}, expected_silu)
    if name == "add_rms_norm":
        arguments = {
            "x": normal(tokens, 20, dtype=dtype),
            "residual": draw(st.sampled_from((None, normal(tokens, 20, dtype=dtype)))),
            "weight": normal(20),
            "eps": 1e-6,
        }
        return Call(decoder.add_rms_norm, arguments, expected_add_norm)
    angles = normal(9, 8)
    arguments = {
        "x": normal(tokens, heads, 22, dtype=dtype),
        "start": 6,
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.randint(0, 9, (tokens,)),
    }
    return Call(decoder.rotate_heads, arguments, expected_heads)


def expected_silu(gate_up):
    """silu(first half) times the second half."""
    gate, up = gate_up.double().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up,)


def expected_add_norm(x, residual, weight, eps):
    """The sum and its norm."""
    total = x if residual is None else x + residual
    wide = total.double()
    return wide, wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def expected_heads(x, start, cos, sin, positions):
    """Heads whose dims from `start` on are rotated; NaN for unknown positions."""
    known = ((positions >= 0) & (positions < len(cos)))[:, None]
    at = positions.clamp(0, len(cos) - 1).long()
    cos, sin = (torch.where(known, t[at].double(), math.nan)[:, None] for t in (cos, sin))
    x = x.double()
    return (torch.cat((x[..., :start], _turned(x[..., start:], cos, sin)), -1),)


@st.composite
def projection_calls(draw: Callable) -> Call:
    """`rotate_absorb`, `join_keys`, `sum_branches` and `rms_norm`."""
    from mlra_kernels import latent_projections as ops

    normal, dtype = normals(draw), draw(HALVES)
    s, b, n, h = (draw(COUNTS) for _ in range(4))
    name = draw(st.sampled_from(("rotate_absorb", "join_keys", "sum_branches", "rms_norm")))
    angles = normal(s, 3)
    tables = {"cos": angles.cos(), "sin": angles.sin()}
    if name == "rotate_absorb":
        q, w_uk = normal(s, b, h, 10, dtype=dtype), normal(n, h, 4, 5, dtype=dtype)
        return Call(ops.rotate_absorb, {"q": q, "w_uk": w_uk} | tables, expected_absorb)
    if name == "join_keys":
        latents, k_rope = normal(s, b, n, h, 5, dtype=dtype), normal(s, b, 6, dtype=dtype)
        return Call(ops.join_keys, {"latents": latents, "k_rope": k_rope} | tables, expected_keys)
    if name == "sum_branches":
        z, w_uv = normal(s, b, n, h, 5, dtype=dtype), normal(n, h, 7, 5, dtype=dtype)
        return Call(ops.sum_branches, {"z": z, "w_uv": w_uv, "scale": 0.5}, expected_sum)
    arguments = {"x": normal(s, b, n, 10, dtype=dtype), "weight": normal(n, 10, dtype=dtype)}
    return Call(ops.rms_norm, arguments | {"eps": 1e-6, "scale": 1.7}, expected_norm)


def expected_absorb(q, w_uk, cos, sin):
    """Absorbed queries, branch-major."""
    (s, _, h, _), (n, heads, nope, _) = q.shape, w_uk.shape
    assert heads == h and len(cos) == len(sin) == s
    q, w, pairs = q.double(), w_uk.double(), []
    for branch in range(n):
        for head in range(h):
            turned = _turned(q[:, :, head, nope:], cos.double()[:, None], sin.double()[:, None])
            pairs.append(torch.cat((q[:, :, head, :nope] @ w[branch, head], turned), -1))
    return (torch.stack(pairs, 2),)


def expected_keys(latents, k_rope, cos, sin):
    """Each latent, followed by the rotated key."""
    assert len(cos) == len(sin) == len(latents)
    key = _turned(k_rope.double(), cos.double()[:, None], sin.double()[:, None])
    latents = latents.double().flatten(2, 3)
    return (torch.cat((latents, key[:, :, None].expand(-1, -1, latents.shape[2], -1)), -1),)


def expected_sum(z, w_uv, scale):
    """Values summed over branches."""
    z, w = z.double(), w_uv.double()
    assert z.shape[2:4] == w.shape[:2]
    heads = [
        sum(z[:, :, branch, head] @ w[branch, head].T for branch in range(len(w)))
        for head in range(w.shape[1])
    ]
    return (torch.stack(heads, 2) * scale,)


def expected_norm(x, weight, eps, scale):
    """RMSNorm of each part."""
    assert x.shape[-2:] == weight.shape
    x = x.double()
    return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() * scale,)


@st.composite
def one_shot_calls(draw: Callable) -> Call:
    """`all_reduce_add_rms_norm` on one of two or three ranks, whose peers' words are there."""
    from mlra_kernels.one_shot import all_reduce_add_rms_norm
    from support.one_shot import boxes_of, deliver, peers_of

    normal, dtype, rows, world = normals(draw), draw(HALVES), draw(COUNTS), draw(st.integers(2, 3))
    tokens, d = draw(st.integers(0, rows)), draw(st.sampled_from((1, 20, 33)))
    me, boxes = draw(st.integers(0, world - 1)), boxes_of(world, rows, d, dtype)
    xs = [normal(tokens, d, dtype=dtype) for _ in range(world)]
    deliver(boxes, me, xs, 1)
    arguments = {
        "x": xs[me],
        "residual": normal(tokens, d, dtype=dtype),
        "weight": normal(d),
        "eps": 1e-6,
        "peers": peers_of(boxes, d, dtype)[me],
    }

    def expected(x, residual, weight, eps, peers):
        """The sum in the order of ranks, and its norm."""
        summands = [x if rank == me else xs[rank][: len(x)] for rank in range(world)]
        total = sum(x.float() for x in summands).to(dtype) + residual
        return expected_add_norm(total, None, weight, eps)

    return Call(all_reduce_add_rms_norm, arguments, expected)


@st.composite
def product_calls(draw: Callable) -> Call:
    """The products of few rows."""
    from mlra_kernels import products

    normal, dtype = normals(draw), draw(HALVES)
    t, n, h = draw(st.integers(1, 2)), draw(COUNTS), draw(COUNTS)
    name = draw(st.sampled_from(("absorb", "sum", "swiglu", "rotated", "product", "product")))
    if name == "absorb":
        q, w_uk = normal(t, h, 6, dtype=dtype), normal(h, 6, n * 5, dtype=dtype)
        arguments = {"q_nope": q, "w_uk": w_uk, "branches": n, "early": False}
        return Call(products.absorb_queries, arguments, expected_queries)
    if name == "sum":
        z, w_uv = normal(t, n, h, 5, dtype=dtype), normal(h, n * 5, 7, dtype=dtype)
        return Call(products.sum_branches, {"z": z, "w_uv": w_uv, "early": False}, expected_values)
    arguments = {
        "x": normal(t, 20, dtype=dtype), "weight": normal(8 * h, 20, dtype=dtype),
        "norm": draw(st.sampled_from((None, normal(20)))), "eps": 1e-6, "early": False,
    }  # fmt: skip
    if name == "swiglu":
        return Call(products.swiglu_product, arguments, expected_swiglu_product)
    if name == "rotated":
        angles = normal(9, 3)
        arguments |= {"head": 8, "start": 2, "cos": angles.cos(), "sin": angles.sin()}
        arguments["positions"] = torch.randint(0, 9, (t,))
        return Call(products.rotated_product, arguments, expected_rotated_product)
    other = normal(t, 8 * h, dtype=dtype)
    arguments[draw(st.sampled_from(("residual", "gated")))] = other
    return Call(products.product, arguments, expected_product)


def _multiplied(x, weight, norm, eps, early):
    """The product of the normed rows."""
    assert isinstance(early, bool) and len(x) <= 2
    x = x.double()
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.double()
    return x @ weight.double().T


def expected_product(x, weight, norm, eps, early, residual=None, gated=None):
    """The product, with a residual or as a gate."""
    y = _multiplied(x, weight, norm, eps, early)
    if residual is not None:
        y = y + residual.double()
    return (y if gated is None else gated.double() * y.sigmoid(),)


def expected_swiglu_product(x, weight, norm, eps, early):
    """silu(first half of the product) times the second half."""
    return expected_silu(_multiplied(x, weight, norm, eps, early))


def expected_rotated_product(x, weight, norm, eps, early, head, start, cos, sin, positions):
    """The product as rotated heads."""
    q = _multiplied(x, weight, norm, eps, early).unflatten(1, (-1, head))
    return expected_heads(q, start, cos, sin, positions)


def expected_queries(q_nope, w_uk, branches, early):
    """Each head's query in latent space, cut into branches."""
    assert isinstance(early, bool) and len(q_nope) <= 2
    heads = [q_nope[:, i].double() @ w.double() for i, w in enumerate(w_uk)]
    return (torch.stack([x.unflatten(1, (branches, -1)) for x in heads], 2),)


def expected_values(z, w_uv, early):
    """Each head's value, from the latents of all its branches side by side."""
    assert isinstance(early, bool) and len(z) <= 2
    heads = [z[:, :, i].double().flatten(1) @ w.double() for i, w in enumerate(w_uv)]
    return (torch.stack(heads, 1),)


@st.composite
def core_calls(draw: Callable) -> Call:
    """`latent_attention`, `latent_attention_with_lse` and `decode_metadata`, which need a GPU."""
    from mlra_kernels import latent_attention as core
    from mlra_kernels.latent_decode import decode_metadata

    normal, s, b, pairs = normals(draw), draw(COUNTS), draw(COUNTS), draw(COUNTS)
    name = draw(st.sampled_from(("latent_attention", "latent_attention_with_lse", "schedule")))
    if name == "schedule":
        arguments = {
            "cache_seqlens": torch.arange(b, dtype=torch.int32), "q_len": 1, "num_latents": 2,
            "heads_per_latent": 4, "latent_dim": 64, "cache_dtype": torch.float16, "page_size": 64,
        }  # fmt: skip
        return Call(decode_metadata, arguments, expected_nothing)
    arguments = {
        "query": normal(s, b, pairs, 48, dtype=torch.float16),
        "key": normal(s, b, 1, 48, dtype=torch.float16),
        "latent_dim": 32,
        "scale": 0.1,
    }
    if name == "latent_attention":
        arguments["ranges"] = torch.zeros(2, s, dtype=torch.int32)
    return Call(getattr(core, name), arguments, expected_nothing)


def expected_nothing(**arguments):
    """Fails: the function must refuse to run without a GPU."""
    raise AssertionError("this needs a GPU")
