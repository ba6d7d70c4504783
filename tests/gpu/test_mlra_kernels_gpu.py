"""The kernels on a GPU against the references: fresh random inputs, poisoned memory, every feature.

Run with `pytest -m gpu tests/gpu`. Seeds come from the clock and are printed with a failure.
"""

import math
import time

import pytest
import torch

from mlra_kernels.latent_decode import (
    DecodeConfig,
    decode_metadata,
    latent_cache_append,
    latent_decode,
    merge_states,
    rope_tables,
)
from mlra_kernels.latent_decode.reference import FP8_DTYPE, FP8_MAX, split_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16_ERROR, FP8_ERROR = 5e-3, 3e-2
HUGE_PAGE = 2**31 - 1


def quantise(cache, latents, dim, rope):
    """FP8 form of a 16-bit cache: e4m3 rows with bf16 RoPE bytes, scales `[pages, L, page]`."""
    pages, page = cache.shape[:2]
    x = cache[..., : latents * dim].float().unflatten(-1, (latents, dim))
    scale = x.abs().amax(-1) / FP8_MAX
    small = torch.empty(pages, page, latents * dim + 2 * rope, dtype=FP8_DTYPE, device=cache.device)
    bits = (x / scale[..., None]).flatten(-2).to(FP8_DTYPE).view(torch.uint8)
    small.view(torch.uint8)[..., : latents * dim] = bits
    split_cache(small, rope)[1].copy_(cache[..., latents * dim :])
    return small, scale.transpose(1, 2).contiguous()


def make_case(
    lengths, *, q_len=1, latents=1, branches=1, heads=64, dim=128, rope=64, page=64,
    dtype=torch.bfloat16, fp8=False,
):  # fmt: skip
    """Random inputs; NaN in every cache row no sequence uses, huge ids in unused table entries."""
    seed = time.time_ns() % 2**31
    print(f"seed {seed}")
    gen = torch.Generator("cuda").manual_seed(seed)
    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts) + 3, generator=gen, device="cuda").int()
    table = torch.full((len(lengths), max(counts) + 2), HUGE_PAGE, dtype=torch.int32, device="cuda")
    width = latents * dim + rope
    cache = torch.randn(len(order), page, width, generator=gen, device="cuda").to(dtype)
    used = torch.zeros(len(order), page, dtype=torch.bool, device="cuda")
    start = 0
    for b, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        pages = order[start : start + count]
        table[b, :count] = pages
        rows = torch.arange(count * page, device="cuda").view(count, page) < n
        used[pages.long()] = rows
        start += count
    scale = None
    if fp8:
        cache, scale = quantise(cache, latents, dim, rope)
        cache.view(torch.uint8)[~used] = 0xFF
        scale.transpose(1, 2)[~used] = math.nan
    else:
        cache[~used] = math.nan
    groups = latents // branches
    q = torch.randn(len(lengths), q_len, latents, heads, dim, generator=gen, device="cuda")
    r = torch.randn(len(lengths), q_len, groups * heads, rope, generator=gen, device="cuda")
    lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    args = (q.to(dtype), r.to(dtype), cache, table, lens, 192**-0.5)
    return args, {"num_branches": branches, "cache_scale": scale}


def metadata_for(args, deterministic=False, config=None):
    q, _, cache, _, lens, _ = args
    return decode_metadata(
        lens, q_len=q.shape[1], num_latents=q.shape[2], heads_per_latent=q.shape[3],
        latent_dim=q.shape[4], cache_dtype=cache.dtype, page_size=cache.shape[1],
        deterministic=deterministic, config=config,
    )  # fmt: skip


def poison():
    """Fill the caching allocator's free memory with NaN: what a kernel does not write shows."""
    blocks = [torch.full((1 << 22,), math.nan, device="cuda") for _ in range(16)]
    torch.cuda.synchronize()
    del blocks


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def check(args, kwargs, limit=BF16_ERROR, **options):
    want_out, want_lse = latent_decode(*args, **kwargs, backend="torch")
    poison()
    out, lse = latent_decode(*args, **kwargs, **options)
    assert torch.isfinite(out).all()
    if want_out.abs().max() > 0:
        error = relative_error(out, want_out)
        assert error <= limit, f"relative error {error:.2e} above {limit}"
    torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=1e-2)
    empty = want_lse == -math.inf
    assert (out[empty] == 0).all()
    return out, lse


RAGGED = [3000, 0, 1, 64, 65, 1023, 0, 4096]


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("dim", "rope", "latents", "branches", "heads"),
    [
        (64, 32, 4, 4, 24),
        (128, 64, 1, 1, 64),
        (128, 64, 4, 2, 48),
        (256, 64, 2, 1, 32),
        (512, 64, 1, 1, 64),
    ],
)
@pytest.mark.parametrize("q_len", [1, 3])
def test_decode_shapes(dim, rope, latents, branches, heads, q_len, fp8):
    case = make_case(
        RAGGED,
        q_len=q_len,
        latents=latents,
        branches=branches,
        heads=heads,
        dim=dim,
        rope=rope,
        fp8=fp8,
    )
    check(*case, FP8_ERROR if fp8 else BF16_ERROR)


@pytest.mark.parametrize("heads", [1, 6, 8, 24, 48, 128])
def test_decode_heads(heads):
    check(*make_case(RAGGED, heads=heads))


@pytest.mark.parametrize("page", [16, 48, 64, 80, 256])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_decode_page_sizes(page, fp8):
    check(*make_case(RAGGED, page=page, fp8=fp8), FP8_ERROR if fp8 else BF16_ERROR)


@pytest.mark.parametrize("q_len", [2, 5, 8])
def test_decode_several_query_tokens(q_len):
    check(*make_case([q_len, 1, 0, 63 + q_len, 2000], q_len=q_len, heads=64))


def test_decode_fp16():
    check(*make_case(RAGGED, dtype=torch.float16), 2e-3)


def test_decode_fp16_queries_over_an_fp8_cache():
    args, kwargs = make_case(RAGGED, fp8=True)
    check((args[0].half(), args[1].half(), *args[2:]), kwargs, FP8_ERROR)


@pytest.mark.parametrize("size", [0.01, 1000.0])
def test_decode_fp8_latents_of_other_sizes(size):
    args, kwargs = make_case(RAGGED, fp8=True)
    kwargs["cache_scale"] *= size
    q_absorbed = args[0] / size
    check((q_absorbed, *args[1:]), kwargs, FP8_ERROR)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_portable_kernel(fp8):
    args, kwargs = make_case(RAGGED, latents=2, branches=2, fp8=fp8)
    metadata = metadata_for(args, config=DecodeConfig(64, 64, 4, 3, 2))
    check(args, kwargs, FP8_ERROR if fp8 else BF16_ERROR, metadata=metadata)


@pytest.mark.parametrize("stages", [4, 6])
def test_consumers_keep_their_ring_apart(stages):
    """Long and crossing sequences, run after run: a slot read too early would show."""
    args, kwargs = make_case([70000, 3, 9000, 64, 20001] * 4)
    config = DecodeConfig(64, 64, 4, stages, 1, hopper=True, consumers=2)
    metadata = metadata_for(args, config=config)
    first = check(args, kwargs, metadata=metadata)
    for _ in range(50):
        again = latent_decode(*args, **kwargs, metadata=metadata)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_all_sequences_empty():
    args, kwargs = make_case([64] * 3)
    args[4].zero_()
    check(args, kwargs)


def test_many_sequences():
    check(*make_case([(37 * i) % 700 for i in range(600)], heads=8))


def test_results_repeat_and_deterministic_ones_ignore_the_batch():
    args, kwargs = make_case([9000, 300, 40000])
    one, two = (latent_decode(*args, **kwargs) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    together = check(args, kwargs, metadata=metadata_for(args, deterministic=True))
    for b in range(3):
        alone = tuple(x[b : b + 1] for x in args[:2]) + args[2:3]
        alone += (args[3][b : b + 1], args[4][b : b + 1], args[5])
        got = latent_decode(*alone, **kwargs, metadata=metadata_for(alone, deterministic=True))
        assert torch.equal(got[0], together[0][b : b + 1])


def test_cuda_graph_follows_new_lengths_without_allocating():
    args, kwargs = make_case([5000, 3000, 800])
    metadata = metadata_for(args)
    latent_decode(*args, **kwargs, metadata=metadata)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metadata.update(args[4])
        out, lse = latent_decode(*args, **kwargs, metadata=metadata)
    reserved = torch.cuda.memory_reserved()
    for lengths in ([5000, 3000, 800], [1, 0, 799], [4999, 64, 128]):
        args[4].copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(math.nan)
        graph.replay()
        want_out, want_lse = latent_decode(*args, **kwargs, backend="torch")
        assert relative_error(out, want_out) <= BF16_ERROR
        torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=1e-2)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved


def test_torch_compile_sees_one_operator():
    args, kwargs = make_case([500, 64])

    def step(*call):
        return latent_decode(*call, **kwargs)[0] + 1

    compiled = torch.compile(step, fullgraph=True)
    assert relative_error(compiled(*args), step(*args)) < 1e-3


def test_cache_over_two_to_the_31_elements():
    """The pages of both ends of a 2.3-billion-element cache, through both kernels."""
    args, kwargs = make_case([64 * 100])
    q, r, small, table, lens, scale = args
    pages = 2_300_000_000 // (64 * 192)
    cache = torch.empty(pages, 64, 192, dtype=torch.bfloat16, device="cuda")
    assert cache.numel() > 2**31
    far = table.clone()
    far[0, :100] = pages - 1 - torch.arange(100, device="cuda").int() * 7
    cache[far[0, :100].long()] = small[table[0, :100].long()]
    want = latent_decode(*args, **kwargs, backend="torch")
    for config in (None, DecodeConfig(64, 64, 4, 3, 2)):
        big = (q, r, cache, far, lens, scale)
        out, lse = latent_decode(*big, **kwargs, metadata=metadata_for(big, config=config))
        assert relative_error(out, want[0]) <= BF16_ERROR
        torch.testing.assert_close(lse, want[1], rtol=1e-3, atol=1e-2)


def test_four_million_tokens():
    check(*make_case([4 << 20], heads=16))


@pytest.mark.parametrize("latents", [1, 4])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_append_writes_what_the_reference_writes(latents, fp8):
    tokens, dim, rope, page = 1000, 128, 64, 64
    kv = torch.randn(tokens, latents * dim + rope, device="cuda").bfloat16()
    weight, (cos, sin) = (
        torch.rand(latents, dim, device="cuda"),
        rope_tables(5000, rope, device="cuda"),
    )
    positions = torch.randint(0, 5000, (tokens,), device="cuda")
    slots = torch.randperm(20 * page, device="cuda")[:tokens]
    slots[::5] = -1
    shape = (20, page, latents * dim + rope * (2 if fp8 else 1))
    filled = []
    for backend in ("torch", "mlra_kernels"):
        cache = torch.full(shape, 0x7F, dtype=torch.uint8, device="cuda").view(FP8_DTYPE)
        cache = cache if fp8 else cache.bfloat16()
        scale = torch.full((20, latents, page), math.nan, device="cuda") if fp8 else None
        latent_cache_append(
            kv, weight, cos, sin, positions, slots, cache,
            latent_scale=2.0, norm_eps=1e-6, cache_scale=scale, backend=backend,
        )  # fmt: skip
        filled.append((cache, scale))
    (want, want_scale), (got, got_scale) = filled
    if fp8:
        torch.testing.assert_close(got_scale, want_scale, rtol=1e-6, atol=0, equal_nan=True)
        step = want.view(torch.uint8).int() - got.view(torch.uint8).int()
        assert step[..., : latents * dim].abs().max() <= 1
        want, got = split_cache(want, rope)[1], split_cache(got, rope)[1]
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2, equal_nan=True)


def test_merge_states_equals_one_call_over_all_tokens():
    args, kwargs = make_case([3000, 700], heads=24, page=64)
    q, r, cache, table, lens, scale = args
    out, lse = latent_decode(*args, **kwargs)
    first = torch.clamp(lens, max=640)
    head = latent_decode(q, r, cache, table, first, scale, **kwargs)
    tail = latent_decode(q, r, cache, table[:, 10:].contiguous(), lens - first, scale, **kwargs)
    outs, lses = torch.stack([head[0], tail[0]]), torch.stack([head[1], tail[1]])
    got = merge_states(outs, lses)
    assert relative_error(got[0], out) <= BF16_ERROR
    torch.testing.assert_close(got[1], lse, rtol=1e-4, atol=1e-3)
    want = merge_states(outs, lses, backend="torch")
    torch.testing.assert_close(got[0], want[0], rtol=1e-2, atol=1e-3)
