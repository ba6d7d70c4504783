"""Prompts' chunks on a GPU, in one launch and in parts, against the same in float32 on a CPU.

python -m pytest -m gpu tests/gpu/test_prefill_gpu.py
"""

from __future__ import annotations

import pytest
import torch

from mlra_kernels.latent_decode.reference import FP8_DTYPE
from mlra_kernels.prefill import prefill_grouped, prefill_latent
from mlra_kernels.prompts import PromptChunk, plan_prompts

pytestmark = pytest.mark.gpu
PAGE, PAGES, HEADS, ROPE = 64, 60, 8, 64
CHUNKS = ((5, 0), (1, 130), (333, 0), (16, 16), (200, 613), (1, 0), (700, 300))
"""(tokens, those in front of them) of the sequences of a step."""
LIMITS = (130, 1000, 10_000)
CASES = {  # latents, branches, latent dim
    "absorbed, a latent a branch": (4, 4, 128),
    "absorbed, two groups": (4, 2, 64),
    "expanded": (2, 1, 256),
    "expanded, one latent": (1, 1, 512),
}
DIM = 128
"""Of a head's key (without RoPE) and value."""


def random_chunks(device):
    order = torch.randperm(PAGES).tolist()
    return [
        PromptChunk(
            tokens,
            start,
            torch.tensor([order.pop() for _ in range(-(-(tokens + start) // PAGE))]).to(device),
        )
        for tokens, start in CHUNKS
    ]


def on(device, chunks):
    return [PromptChunk(c.tokens, c.start, c.pages.to(device)) for c in chunks]


def off(found, expected):
    found, expected = found.double().cpu(), expected.double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("name", CASES)
def test_latents(name, fp8, limit):
    torch.manual_seed(3)
    latents, n, l = CASES[name]
    width = latents * l
    rows = torch.randn(PAGES, PAGE, width + ROPE).bfloat16()
    layer = (rows, None)
    if fp8:
        key = rows[..., width:].contiguous().view(torch.uint8)
        low = rows[..., :width].to(FP8_DTYPE).view(torch.uint8)
        scale = torch.rand(PAGES, latents, PAGE) + 0.5
        layer = (torch.cat((low, key), -1).view(FP8_DTYPE), scale)
    w_uk = (torch.randn(HEADS, DIM, n * l) / l**0.5).bfloat16()
    w_uv = (torch.randn(HEADS, n * l, DIM) / l**0.5).bfloat16()
    chunks = random_chunks("cpu")
    q = torch.randn(sum(c.tokens for c in chunks), HEADS, DIM + ROPE).bfloat16()

    def run(device, dtype):
        data, scale = layer
        cache = (data if fp8 else data.to(dtype), scale)
        return prefill_latent(
            q.to(device, dtype),
            tuple(None if x is None else x.to(device) for x in cache),
            plan_prompts(on(device, chunks), PAGE, limit),
            w_uk=w_uk.to(device, dtype),
            w_uv=w_uv.to(device, dtype),
            rope_dim=ROPE,
            branches=n,
            softmax_scale=(DIM + ROPE) ** -0.5,
        )

    assert off(run("cuda", torch.bfloat16), run("cpu", torch.float32)) < 1.5e-2


@pytest.mark.parametrize("limit", LIMITS)
def test_grouped_keys(limit):
    torch.manual_seed(4)
    chunks = random_chunks("cpu")
    layer = torch.randn(2, PAGES, PAGE, 2, DIM).bfloat16()
    q = torch.randn(sum(c.tokens for c in chunks), HEADS, DIM).bfloat16()
    expected = prefill_grouped(
        q.float(), layer.float(), plan_prompts(chunks, PAGE, limit), DIM**-0.5
    )
    found = prefill_grouped(
        q.cuda(), layer.cuda(), plan_prompts(on("cuda", chunks), PAGE, limit), DIM**-0.5
    )
    assert off(found, expected) < 1.5e-2
