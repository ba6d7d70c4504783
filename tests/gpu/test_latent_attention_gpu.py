"""The absorbed core's Hopper kernels on a GPU, against float64.

python -m pytest -m gpu tests/gpu/test_latent_attention_gpu.py
"""

from __future__ import annotations

import math

import pytest
import torch

from mlra_kernels.latent_attention import (
    key_ranges,
    latent_attention,
    latent_attention_with_lse,
    latent_attention_with_top,
    query_tiles,
)

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Relative difference of norms against float64 on the same rounded inputs."""

# s, t, b, pairs, groups, latent, rope
SHAPES = {
    "MLRA-4 2.9B": (1024, 1024, 2, 96, 4, 128, 64),
    "MLRA-2": (513, 513, 3, 16, 4, 64, 32),
    "narrow": (300, 300, 1, 8, 8, 32, 16),
    "wide latent, narrow RoPE": (256, 256, 2, 4, 1, 128, 16),
    "the last queries": (200, 777, 1, 8, 4, 128, 64),
    "one token": (1, 1, 1, 4, 4, 128, 64),
}


# Spans of queries and their keys beside the sizes: documents, and a rank's share of some.
SPANS = {
    "documents": (
        (1000, 1000, 1, 24, 4, 128, 64),
        ((0, 1, 0, 1), (1, 300, 1, 300), (300, 307, 300, 307), (307, 1000, 307, 1000)),
    ),
    "a rank's chunks": ((512, 2048, 2, 8, 4, 128, 64), ((0, 256, 0, 256), (256, 512, 0, 2048))),
    "a rank's documents": (
        (400, 800, 1, 8, 2, 64, 32),
        ((0, 130, 0, 130), (130, 260, 0, 520), (260, 330, 520, 590), (330, 400, 520, 800)),
    ),
    "short documents": (
        (600, 600, 1, 4, 1, 32, 16),
        tuple((a, a + 5, a, a + 5) for a in range(0, 600, 5)),
    ),
}


def oracle(query, key, grad, latent_dim, scale, ranges=None):
    query, key = (x.double().requires_grad_() for x in (query, key))
    keys = key.repeat_interleave(query.size(2) // key.size(2), 2)
    x = torch.einsum("sbpe,tbpe->bpst", query, keys) * scale
    at = torch.arange(len(key), device=x.device)
    if ranges is None:
        unread = at > at[len(key) - len(query) :, None]
    else:
        unread = (at < ranges[0, :, None]) | (at > ranges[1, :, None])
    x = x.masked_fill(unread, -math.inf)
    out = torch.einsum("bpst,tbpl->sbpl", x.softmax(-1), keys[..., :latent_dim])
    grads = torch.autograd.grad(out, (query, key), grad.double())
    return out, *grads, x.detach().amax((0, 2, 3))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("shape", "spans"),
    [*((shape, None) for shape in SHAPES.values()), *SPANS.values()],
    ids=[*SHAPES, *SPANS],
)
def test_output_and_gradients(shape, spans, dtype) -> None:
    ranges = key_ranges(spans).cuda() if spans else None
    s, t, b, pairs, groups, latent, rope = shape
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(tokens: int, heads: int, width: int) -> torch.Tensor:
        x = torch.randn(tokens, b, heads, width, generator=generator, device="cuda")
        return x.to(dtype)

    query, key = draw(s, pairs, latent + rope), draw(t, groups, latent + rope)
    grad, scale = draw(s, pairs, latent), (latent + rope) ** -0.5
    leaves = [x.requires_grad_() for x in (query, key)]
    *expected, top = oracle(query.detach(), key.detach(), grad, latent, scale, ranges)
    tiles = query_tiles(spans or [(0, s, 0, t)]).cuda()
    for options in ({"tiles": tiles}, {"ranges": ranges}):
        torch.full((64 << 20,), math.nan, device="cuda")  # what a kernel does not write shows
        out = latent_attention(*leaves, latent, scale, **options)
        found = (out, *torch.autograd.grad(out, leaves, grad))
        for what, ours, theirs in zip(("out", "query", "key"), found, expected, strict=True):
            assert ours.dtype == dtype and ours.shape == theirs.shape
            # A query with one key has no gradient.
            difference = (ours.double() - theirs).norm() / theirs.norm().clamp(min=1)
            assert difference <= TOLERANCE[dtype], (what, *options, float(difference))
        again, largest = latent_attention_with_top(*leaves, latent, scale, **options)
        assert torch.equal(again, out) and not largest.requires_grad
        again, _ = latent_attention_with_lse(*leaves, latent, scale, **options)
        assert torch.equal(again, out)
        # The products are exact in float32 up to the order of their sum.
        assert (largest - top).abs().max() <= 1e-4 * top.abs().max()


def test_repeated_launches_agree() -> None:
    """Where warps run apart, some launch of many would read a tile too early."""
    torch.manual_seed(1)
    query = torch.randn(2048, 2, 96, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    key = torch.randn(2048, 2, 4, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    first = None
    for _ in range(20):
        out = latent_attention(query, key, 128, 192**-0.5)
        grads = torch.autograd.grad(out, (query, key), out.detach())
        first = first or (out, *grads)
        assert torch.equal(out, first[0]) and torch.equal(grads[0], first[1])
        assert (grads[1] - first[2]).float().norm() <= 1e-3 * first[2].float().norm()


@pytest.mark.parametrize(("s", "t"), [(200, 777), (300, 64)])
def test_every_key(s, t) -> None:
    """Without a mask, and the logarithm of the denominators."""
    torch.manual_seed(1)
    query = torch.randn(s, 1, 24, 192, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(t, 1, 4, 192, device="cuda", dtype=torch.bfloat16)
    out, lse = latent_attention_with_lse(query, key, 128, 192**-0.5, causal=False)
    keys = key.double().repeat_interleave(6, 2)
    x = torch.einsum("sbpe,tbpe->bpst", query.double(), keys) * 192**-0.5
    expected = torch.einsum("bpst,tbpl->sbpl", x.softmax(-1), keys[..., :128])
    assert (out.double() - expected).norm() <= TOLERANCE[torch.bfloat16] * expected.norm()
    assert (lse - x.logsumexp(-1)).abs().max() <= 1e-4
