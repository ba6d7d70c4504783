"""The torch references against float64 loops, head by head; input checks; operator registration."""

import math
import subprocess
import sys

import pytest
import torch

from mlra_kernels.latent_decode import (
    DecodeConfig,
    latent_cache_append,
    latent_decode,
    merge_states,
    rope_tables,
)
from mlra_kernels.latent_decode.descriptors import scale_descriptor, tile_descriptor
from mlra_kernels.latent_decode.reference import FP8_DTYPE
from support.paged import paged_case


def loops(q_absorbed, q_rope, cache, table, seqlens, scale, branches):
    """Attention one head and one query token at a time, in float64."""
    batch, q_len, latents, heads, dim = q_absorbed.shape
    page = cache.shape[1]
    out = torch.zeros(q_absorbed.shape, dtype=torch.float64)
    lse = torch.full(q_absorbed.shape[:4], -math.inf, dtype=torch.float64)
    for b in range(batch):
        n = int(seqlens[b])
        rows = [cache[table[b, t // page], t % page].double() for t in range(n)]
        for i in range(q_len):
            seen = rows[: max(0, n - q_len + i + 1)]
            if not seen:
                continue
            for latent in range(latents):
                c = torch.stack([row[latent * dim : (latent + 1) * dim] for row in seen])
                k = torch.stack([row[latents * dim :] for row in seen])
                for j in range(heads):
                    head = latent % (latents // branches) * heads + j
                    q, r = q_absorbed[b, i, latent, j].double(), q_rope[b, i, head].double()
                    score = scale * (c @ q + k @ r)
                    lse[b, i, latent, j] = torch.logsumexp(score, 0)
                    out[b, i, latent, j] = torch.softmax(score, 0) @ c
    return out, lse


@pytest.mark.parametrize(("latents", "branches"), [(1, 1), (2, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("q_len", [1, 3])
def test_decode_matches_loops(latents, branches, q_len):
    case = paged_case(
        [37, 0, 16, 2],
        q_len=q_len,
        latents=latents,
        branches=branches,
        heads=3,
        dim=64,
        rope=32,
        page=16,
        dtype=torch.float32,
    )
    out, lse = latent_decode(*case, 0.1, num_branches=branches, backend="torch")
    want_out, want_lse = loops(*case, 0.1, branches)
    torch.testing.assert_close(out.double(), want_out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-6)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all()


def test_append_writes_normed_rotated_rows_and_skips_padding():
    gen = torch.Generator().manual_seed(1)
    tokens, latents, dim, rope, page = 5, 2, 64, 32, 16
    kv = torch.randn(tokens, latents * dim + rope, generator=gen)
    weight = torch.rand(latents, dim, generator=gen) + 0.5
    cos, sin = rope_tables(50, rope)
    positions = torch.tensor([3, 49, 0, 7, 8])
    slots = torch.tensor([17, 0, -1, 31, 5])
    cache = torch.full((2, page, latents * dim + rope), math.nan)
    latent_cache_append(
        kv, weight, cos, sin, positions, slots, cache,
        latent_scale=1.5, norm_eps=1e-6, backend="torch",
    )  # fmt: skip
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        row = cache[slot // page, slot % page].double()
        for latent in range(latents):
            x = kv[token, latent * dim : (latent + 1) * dim].double()
            want = x / (x.pow(2).mean() + 1e-6).sqrt() * weight[latent].double() * 1.5
            torch.testing.assert_close(
                row[latent * dim : (latent + 1) * dim], want, rtol=1e-5, atol=1e-5
            )
        for i in range(rope // 2):
            angle = int(positions[token]) * 10000.0 ** (-2 * i / rope)
            a, b = (
                kv[token, latents * dim + i].double(),
                kv[token, latents * dim + rope // 2 + i].double(),
            )
            want = torch.stack(
                [
                    a * math.cos(angle) - b * math.sin(angle),
                    b * math.cos(angle) + a * math.sin(angle),
                ]
            )
            got = row[[latents * dim + i, latents * dim + rope // 2 + i]]
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert cache.isnan().any(-1).sum() == 2 * page - 4


def test_fp8_append_then_decode_stays_near_the_exact_cache():
    gen = torch.Generator().manual_seed(2)
    tokens, latents, dim, rope, page = 40, 2, 64, 32, 16
    kv = torch.randn(tokens, latents * dim + rope, generator=gen)
    weight, (cos, sin) = torch.ones(latents, dim), rope_tables(64, rope)
    positions, slots = torch.arange(tokens), torch.arange(tokens)
    exact = torch.zeros(3, page, latents * dim + rope)
    small = torch.zeros(3, page, latents * dim + 2 * rope).to(FP8_DTYPE)
    scale = torch.zeros(3, latents, page)
    common = (kv, weight, cos, sin, positions, slots)
    options = {"latent_scale": 1.0, "norm_eps": 1e-6, "backend": "torch"}
    latent_cache_append(*common, exact, **options)
    latent_cache_append(*common, small, cache_scale=scale, **options)
    q = torch.randn(1, 1, latents, 4, dim, generator=gen)
    r = torch.randn(1, 1, 4, rope, generator=gen)
    table = torch.arange(3, dtype=torch.int32)[None]
    lens = torch.tensor([tokens], dtype=torch.int32)
    want, _ = latent_decode(q, r, exact, table, lens, 0.1, num_branches=2, backend="torch")
    got, _ = latent_decode(
        q, r, small, table, lens, 0.1, num_branches=2, cache_scale=scale, backend="torch"
    )
    assert (got - want).norm() / want.norm() < 5e-2


def test_merge_states_equals_attention_over_the_union():
    gen = torch.Generator().manual_seed(3)
    scores, values = torch.randn(7, 30, generator=gen), torch.randn(30, 20, generator=gen)
    parts = [slice(0, 4), slice(4, 4), slice(4, 30)]
    outs = torch.stack([torch.softmax(scores[:, p], 1) @ values[p] for p in parts])
    outs[1] = math.nan  # an empty part may carry anything
    lses = torch.stack([torch.logsumexp(scores[:, p], 1) for p in parts])
    out, lse = merge_states(outs, lses, backend="torch")
    torch.testing.assert_close(out, torch.softmax(scores, 1) @ values)
    torch.testing.assert_close(lse, torch.logsumexp(scores, 1))
    out, lse = merge_states(outs[1:2], lses[1:2], backend="torch")
    assert (out == 0).all() and (lse == -math.inf).all()


def small_call(**changes):
    q, r, cache, table, lens = paged_case(
        [20], q_len=1, latents=2, branches=2, heads=2, dim=64, rope=32, page=16, dtype=torch.float16
    )
    args = {
        "q_absorbed": q,
        "q_rope": r,
        "cache": cache,
        "block_table": table,
        "cache_seqlens": lens,
        "softmax_scale": 0.1,
        "num_branches": 2,
        "backend": "torch",
    }
    return latent_decode(**{**args, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "fast"}, "backend is 'fast': choose one of"),
        ({"backend": "mlra_kernels"}, "needs CUDA tensors, got cpu: move them"),
        ({"num_branches": 3}, "num_branches is 3: it must divide the 2 latents"),
        ({"softmax_scale": 0.0}, "softmax_scale is 0.0: give a positive"),
        ({"cache": torch.zeros(3, 15, 160).half()}, "page size is 15: make it a multiple of 16"),
        ({"cache": torch.zeros(3, 16, 161).half()}, "cache rows hold 161 elements"),
        ({"cache": torch.zeros(3, 16, 160)}, "cache is torch.float32 and queries are"),
        ({"block_table": torch.zeros(1, 2).long()}, "make both int32"),
        ({"cache_seqlens": torch.zeros(2).int()}, r"cache_seqlens is \(2,\): give \[1\]"),
        ({"q_rope": torch.zeros(1, 1, 4, 32).half()}, "q_rope is .* must be"),
        ({"cache_scale": torch.zeros(3, 2, 16)}, "cache_scale is given for a"),
        ({"cache": torch.zeros(3, 16, 192).to(FP8_DTYPE)}, "FP8 cache needs cache_scale"),
    ],
)
def test_wrong_input_names_value_and_fix(changes, message):
    with pytest.raises(ValueError, match=message):
        small_call(**changes)


def test_unsafe_ring_is_refused():
    with pytest.raises(ValueError, match="make it a multiple of 2 from 4 up"):
        DecodeConfig(64, 64, 4, 5, 1, hopper=True, consumers=2)


def test_operators_are_registered_for_torch_compile():
    case = paged_case(
        [20], q_len=1, latents=2, branches=2, heads=2, dim=64, rope=32, page=16, dtype=torch.float32
    )
    op = torch.ops.mlra_kernels.latent_decode_reference
    torch.library.opcheck(op, (*case, 0.1, 2, None), test_utils=("test_schema", "test_faketensor"))

    def step(*args):
        return latent_decode(*args, 0.1, num_branches=2, backend="torch")[0] * 2

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*case), step(*case))


def test_import_needs_torch_and_triton_only():
    code = (
        "import sys, mlra_kernels.latent_decode; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'megatron', 'megatron_mlra', 'transformers', 'matplotlib', 'flash_attn', 'pytest'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_descriptions_for_the_copy_engine_need_aligned_memory():
    """The Hopper kernel's; the portable one takes such scales and caches."""
    memory = torch.zeros(2 * 4 * 64 + 4)
    scale = memory[4:].view(2, 4, 64)
    assert scale_descriptor(scale, 64).shape == [8, 64]
    for first in (1, 2, 3):
        with pytest.raises(ValueError, match=f"cache_scale begins {4 * first} bytes past a multi"):
            scale_descriptor(memory[first : first + scale.numel()].view(2, 4, 64), 64)
    cache = torch.zeros(2 * 64 * 192 + 1, dtype=torch.float16)[1:].view(2, 64, 192)
    with pytest.raises(ValueError, match="begin 2 bytes past a multiple of 16"):
        tile_descriptor(cache[..., :128], 64, 128)
