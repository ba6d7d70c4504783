"""The simulated FP8 RoPE key: the keys of the tokens that are written, and nothing else."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_mlra.evaluation.rope_rounding import RoundedRopeOps, rounded
from megatron_mlra.inference.backends.reference import ReferenceOps
from mlra_kernels.latent_decode.reference import FP8_DTYPE, rope_tables, split_cache


def nearest(x, scale):
    """x as the nearest e4m3 number times the scale, by trying all numbers."""
    every = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE).float()
    every = every[~every.isnan()] * scale
    return every[(every - x).abs().argmin()].item()


def test_keys_are_rounded_to_e4m3_with_a_scale_per_token():
    keys = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    keys[1] *= 1e4
    keys[2] = 0
    got = rounded(keys)
    for row, result in zip(keys, got, strict=True):
        scale = row.abs().max().item() / 448 or 1.0
        want = torch.tensor([nearest(x, scale) for x in row.tolist()])
        torch.testing.assert_close(result, want, rtol=1e-6, atol=1e-12)
    assert rounded(keys.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("fp8", [False, True])
def test_append_rounds_what_it_writes(fp8):
    page, dim, rope, pages = 16, 64, 32, 3
    dtype = FP8_DTYPE if fp8 else torch.float32
    shape = (pages, page, dim + rope * (2 if fp8 else 1))
    kv = torch.randn(4, dim + rope, generator=torch.Generator().manual_seed(2))
    slots = torch.tensor([17, -1, 3, pages * page])  # the second and the last write nothing
    step = SimpleNamespace(positions=torch.arange(4), slots=slots)
    stored = []
    for ops in (ReferenceOps(), RoundedRopeOps(ReferenceOps(), rope)):
        data = torch.full(shape, 1.0).to(dtype)
        scale = torch.full((pages, 1, page), math.nan) if fp8 else None
        tables = rope_tables(8, rope)
        ops.append(kv, torch.ones(1, dim), tables, step, (data, scale), 1.0, 1e-6)
        assert ops.name == "torch"
        stored.append([x.flatten(0, 1).float() for x in split_cache(data, rope)])
    (latents, keys), (same, others) = stored
    assert torch.equal(latents, same)
    written = torch.tensor([17, 3])
    assert torch.equal(
        others[written], rounded(keys[written].to(torch.bfloat16 if fp8 else dtype)).float()
    )
    assert not torch.equal(others[written], keys[written])
    untouched = torch.ones(pages * page, dtype=torch.bool)
    untouched[written] = False
    assert torch.equal(others[untouched], keys[untouched])
