"""The absorbed core's kernels without a GPU: emulated against float64, and compiled for Hopper."""

import itertools
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from mlra_kernels.latent_attention import (
    backward_kernel,
    check_supported,
    forward_kernel,
    key_ranges,
    ops,
    query_tiles,
    reads_of,
)
from mlra_kernels.latent_attention.reference import latent_attention_reference
from support.emulated import launch
from support.emulated_memory import Descriptor, Pointer

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler"
)


def documents(*lengths: int) -> tuple[tuple[int, int, int, int], ...]:
    """Spans of packed documents."""
    bounds = itertools.accumulate(lengths, initial=0)
    return tuple((a, b, a, b) for a, b in itertools.pairwise(bounds))


# s, t, b, pairs, groups, latent, rope, queries of a program, keys of a tile[, keys before the first
# query's own place, without which the queries are the last; or spans of queries and their keys]
SHAPES = {
    "MLRA-4": (256, 256, 2, 8, 4, 32, 16, 64, 32),
    "wide tiles": (256, 256, 1, 4, 2, 32, 16, 128, 64),
    "as many keys as queries": (128, 128, 1, 4, 1, 32, 16, 64, 64),
    "ragged end": (200, 200, 2, 4, 4, 32, 16, 64, 32),
    "less than a tile": (40, 40, 1, 2, 2, 32, 16, 64, 32),
    "the last queries": (100, 230, 1, 4, 2, 32, 16, 64, 32),
    "one query": (1, 65, 2, 4, 2, 32, 16, 64, 32),
    "every key": (100, 230, 1, 4, 2, 32, 16, 64, 32, 230),
    "every key of few": (150, 40, 1, 4, 2, 32, 16, 128, 64, 40),
    "two documents": (256, 256, 1, 4, 2, 32, 16, 64, 32, ((0, 128, 0, 128), (128, 256, 128, 256))),
    "documents": (200, 200, 2, 4, 2, 32, 16, 64, 32, documents(1, 70, 3, 66, 33, 27)),
    "short documents": (130, 130, 1, 4, 2, 32, 16, 128, 64, documents(*[5] * 26)),
    "a rank's two chunks": (96, 384, 1, 4, 2, 32, 16, 64, 32, ((0, 48, 0, 96), (48, 96, 0, 384))),
    "a rank's documents": (
        100, 200, 1, 4, 2, 32, 16, 64, 32,
        ((0, 30, 0, 60), (30, 45, 60, 75), (45, 46, 75, 140), (46, 100, 140, 200)),
    ),
}  # fmt: skip


PASSES = ("forward", "backward")


def oracle(query, key, grad, latent_dim, scale, ranges):
    """Output, lse, largest scores and gradients in float64."""
    at = torch.arange(len(key))
    query, key = (x.double().requires_grad_() for x in (query, key))
    keys = key.repeat_interleave(query.size(2) // key.size(2), 2)
    x = torch.einsum("sbpe,tbpe->bpst", query, keys) * scale
    x = x.masked_fill((at < ranges[0, :, None]) | (at > ranges[1, :, None]), -math.inf)
    out = torch.einsum("bpst,tbpl->sbpl", x.softmax(-1), keys[..., :latent_dim])
    grads = torch.autograd.grad(out, (query, key), grad.double())
    return out.detach(), x.logsumexp(-1).detach(), x.detach().amax(-1), *grads


@pytest.mark.parametrize("name", ["MLRA-4", "the last queries", "every key", "a rank's documents"])
def test_reference_equals_the_oracle(name):
    s, t, b, pairs, groups, latent, rope, _, _, *more = SHAPES[name]
    said = more[0] if more else t - s
    generator = torch.Generator().manual_seed(2)
    query, key, grad = (
        torch.randn(tokens, b, heads, size, generator=generator)
        for tokens, heads, size in (
            (s, pairs, latent + rope), (t, groups, latent + rope), (s, pairs, latent)
        )
    )  # fmt: skip
    if isinstance(said, int):
        ranges = torch.stack([torch.zeros(s), torch.arange(said, said + s)])
        options = {"causal": said < t}
    else:
        ranges = key_ranges(said)
        options = {"ranges": ranges}
    *expected, _, dq, dk = oracle(query, key, grad, latent, 0.3, ranges)
    leaves = query.requires_grad_(), key.requires_grad_()
    out, lse = latent_attention_reference(*leaves, latent, 0.3, **options)
    found = (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad))
    for ours, theirs in zip(found, (*expected, dq, dk), strict=True):
        assert difference(ours, theirs) < 1e-6


def difference(found, expected) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("first, last", [(90, 3), (-5, 2**30), (0, 2**30), (2**30, 2**30), (50, 0)])
def test_ranges_that_cannot_be_neither_wait_for_ever_nor_read_on(first, last):
    s, width = 70, 48
    query, key, out = torch.ones(s, 2, width), torch.ones(90, 1, width), torch.empty(s, 2, 32)
    ranges = torch.tensor([[first], [last]]).expand(2, s).contiguous()

    def rows(x, count, columns):
        return Descriptor(x.flatten(1), count, columns)

    def attend() -> None:
        launch(
            forward_kernel.latent_attention_forward, (2, 2, 1), lazy=True, warps=4,
            q_nope_desc=rows(query, 32, 32), q_rope_desc=rows(query, 32, 16),
            key_nope_desc=rows(key, 32, 32), key_rope_desc=rows(key, 32, 16),
            out_desc=rows(out, 32, 32), lse_ptr=Pointer(torch.empty(1, 2, s)), top_ptr=None,
            ranges_ptr=Pointer(ranges), s=s, t=90, past=None, log2_scale=1.0, out_ptr=None,
            P=2, G=1, L=32, R=16, M=64, N=32, STAGES=3, RANGES=True, TILES=False, tiles_ptr=None,
        )  # fmt: skip

    if first <= min(last, 89):
        return attend()
    # A query that reads no key has no result, which the emulator does not copy out.
    with pytest.raises(AssertionError) as refused:
        attend()
    assert refused.traceback[-1].name == "leave"


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize(
    ("name", "stages"),
    [
        (name, stages)
        for name in SHAPES
        for stages in (3, 4, "tiles")
        if stages != "tiles" or not name.startswith("every key")  # no span says that
    ],
)
def test_values_and_gradients(name, stages, lazy):
    shape = SHAPES[name]
    s, t, b, pairs, groups, latent, rope, queries, keys = shape[:9]
    said = shape[9] if len(shape) > 9 else t - s
    past = said if isinstance(said, int) else None
    if past is None:
        ranges = key_ranges(said)
    else:
        ranges = torch.stack([torch.zeros(s), torch.arange(past, past + s)])
    generator = torch.Generator().manual_seed(1)
    width, scale = latent + rope, 0.3
    query, key, grad = (
        torch.randn(tokens, b, heads, size, generator=generator)
        for tokens, heads, size in ((s, pairs, width), (t, groups, width), (s, pairs, latent))
    )
    expected = oracle(query, key, grad, latent, scale, ranges)
    out = torch.full((s, b, pairs, latent), math.nan)
    lse = torch.full((b, pairs, s), math.nan)
    top, delta, grad_query = lse.clone(), lse.clone(), query * math.nan
    grad_key = key * 0

    def rows(x, count, columns):
        return Descriptor(x.flatten(1), count, columns)

    half = queries // 2
    grid = (triton.cdiv(s, queries), pairs, b)
    inputs = {
        "q_nope_desc": rows(query, half, latent),
        "q_rope_desc": rows(query, half, rope),
        "key_nope_desc": rows(key, keys, latent),
        "key_rope_desc": rows(key, keys, rope),
        "lse_ptr": Pointer(lse),
        "s": s,
        "t": t,
        "ranges_ptr": Pointer(ranges),
        "past": past,
        "log2_scale": scale / math.log(2),
    } | {"P": pairs, "G": groups, "L": latent, "R": rope, "M": queries, "N": keys}
    inputs |= {"RANGES": past is None, "TILES": False, "tiles_ptr": None, "out_ptr": None}
    if stages == "tiles":
        spans = said if past is None else [(0, s, 0, t)]
        tiles = query_tiles(spans, queries)
        grid = (len(tiles) * pairs, b)
        inputs |= {"RANGES": False, "ranges_ptr": None, "past": None, "TILES": True}
        inputs |= {"tiles_ptr": Pointer(tiles), "out_ptr": Pointer(out)}
    run = {"lazy": lazy, "warps": 4}
    launch(
        forward_kernel.latent_attention_forward, grid, **run, **inputs,
        out_desc=rows(out, half, latent), top_ptr=Pointer(top),
        STAGES=3 if stages == "tiles" else stages,
    )  # fmt: skip
    assert difference(out, expected[0]) < 1e-6 and difference(lse, expected[1]) < 1e-6
    assert (top - expected[2]).abs().max() <= 1e-6 * expected[2].abs().max()

    products = {"a_ptr": Pointer(out), "b_ptr": Pointer(grad), "out_ptr": Pointer(delta)}
    products |= {"s": s, "b": b, "P": pairs, "L": latent, "T": 32}
    launch(backward_kernel.row_products, (triton.cdiv(s, 32), pairs, b), **run, **products)
    del inputs["out_ptr"]
    launch(
        backward_kernel.latent_attention_backward, grid, **run, **inputs,
        do_desc=rows(grad, half, latent), dq_nope_desc=rows(grad_query, half, latent),
        dq_rope_desc=rows(grad_query, half, rope), scale=scale, dq_ptr=Pointer(grad_query),
        delta_ptr=Pointer(delta),
        dkey_nope_desc=rows(grad_key, keys, latent), dkey_rope_desc=rows(grad_key, keys, rope),
    )  # fmt: skip
    assert difference(grad_query, expected[3]) < 2e-6
    assert difference(grad_key, expected[4]) < 2e-6


def compiled(kernel, types, constants, folder, launch) -> tuple[str, int, int]:
    """SASS, shared memory of a program and stack of a thread, in bytes."""
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    at = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    pointers = {at[n]: [["tt.divisibility", 16]] for n, kind in types.items() if kind[0] == "*"}
    values = {at[name]: value for name, value in constants.items()}
    binary = triton.compile(
        GluonASTSource(kernel, signature, values, pointers),
        target=GPUTarget("cuda", 90, 32),
        options=launch,
    )
    file = folder / "kernel.cubin"
    file.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    run = [str(tool), "--dump-resource-usage", "--dump-sass", str(file)]
    text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    (folder / "kernel.ptx").write_text(binary.asm["ptx"])
    again = [get_ptxas(90).path, "--gpu-name=sm_90a", "-v", str(folder / "kernel.ptx")]
    said = subprocess.run([*again, "-o", "/dev/null"], capture_output=True, text=True, check=True)
    assert "Performance Loss" not in said.stderr, "products wait for each other: " + said.stderr
    return text, binary.metadata.shared, int(re.search(r"STACK:(\d+)", text)[1])


def rows_type(rows: int, columns: int, dtype=gl.bfloat16) -> str:
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
    return f"tensordesc<{dtype}[{rows}, {columns}],{layout!r}>"


@pytest.mark.parametrize(
    ("latent", "rope", "which"),
    [
        *((*sizes, which) for sizes in ((128, 64), (64, 32), (32, 16)) for which in PASSES),
        (128, 64, "forward with top"),
    ],
)
@pytest.mark.parametrize("ranges", [False, True, None], ids=["causal", "ranges", "tiles"])
def test_compiles_for_hopper(which, ranges, latent, rope, tmp_path):
    backward = which == "backward"
    keys = ops.BACKWARD_KEYS if backward else ops.FORWARD_KEYS
    half = ops.QUERIES // 2
    constants = {"P": 24, "G": 4, "L": latent, "R": rope, "M": ops.QUERIES, "N": keys}
    tiles = ranges is None
    constants |= {"RANGES": ranges is True, "TILES": tiles}
    of_queries = {"nope": rows_type(half, latent), "rope": rows_type(half, rope)}
    types = {f"q_{part}_desc": kind for part, kind in of_queries.items()}
    types |= {"key_nope_desc": rows_type(keys, latent), "key_rope_desc": rows_type(keys, rope)}
    types |= {"lse_ptr": "*fp32", "log2_scale": "fp32"}
    for name, given, kind in (
        ("ranges_ptr", ranges, "*i32"), ("tiles_ptr", tiles, "*i32"),
        ("dq_ptr" if backward else "out_ptr", tiles, "*bf16"),
    ):  # fmt: skip
        if given:
            types[name] = kind
        else:
            constants[name] = None
    if backward:
        kernel, launch = backward_kernel.latent_attention_backward, ops.BACKWARD_LAUNCH
        types |= {f"dq_{part}_desc": kind for part, kind in of_queries.items()}
        types |= {"do_desc": of_queries["nope"], "scale": "fp32", "delta_ptr": "*fp32"}
        types |= {"dkey_nope_desc": rows_type(keys, latent, gl.float32)}
        types |= {"dkey_rope_desc": rows_type(keys, rope, gl.float32)}
    else:
        kernel, launch = forward_kernel.latent_attention_forward, ops.FORWARD_LAUNCH
        types["out_desc"] = of_queries["nope"]
        constants["STAGES"] = ops.STAGES
        if which == "forward":
            constants["top_ptr"] = None
        else:
            types["top_ptr"] = "*fp32"
    sass, shared, stack = compiled(kernel, types, constants, tmp_path, launch)
    assert "HGMMA" in sass and "UTMALDG" in sass and ("UTMAREDG" in sass) == backward
    assert shared <= 232448, "more shared memory than a block of an H100 has"
    # One value that is needed after the loop.
    assert stack <= 8 * (backward and ranges is True), f"{stack} bytes of registers do not fit"


@pytest.mark.parametrize(
    ("query", "key", "latent_dim", "said"),
    [
        ((8, 1, 4, 192), (8, 1, 2, 192), 100, "latent dim 100 with 92 RoPE dims"),
        ((8, 1, 4, 192), (8, 1, 3, 192), 128, "4 query heads are no multiple of 3 key heads"),
        (
            (8, 1, 4, 192),
            (7, 1, 2, 192),
            128,
            r"query is \[8, 1, 4, 192\] and key \[7, 1, 2, 192\]",
        ),
    ],
)
def test_shapes_that_do_not_fit(query, key, latent_dim, said):
    tensors = (torch.empty(shape, dtype=torch.bfloat16) for shape in (query, key))
    with pytest.raises(ValueError, match=said):
        check_supported(*tensors, latent_dim)


def test_ranges_that_do_not_fit():
    query = torch.empty(8, 1, 4, 192)
    for ranges in (torch.zeros(2, 7, dtype=torch.int32), torch.zeros(2, 8)):
        with pytest.raises(ValueError, match=r"; it is torch.int32 \[2, 8\] on cpu"):
            ops._check_ranges(ranges, query)


def test_other_dtypes_and_devices():
    query = torch.empty(8, 1, 4, 192)
    with pytest.raises(ValueError, match=r"query is torch.float32; latent_attention takes bfloat"):
        ops.latent_attention(query, query, 128, 1.0)
    query = query.bfloat16()
    with pytest.raises(ValueError, match="runs on Hopper GPUs, not on cpu"):
        ops.latent_attention(query, query, 128, 1.0)


def test_tiles_take_every_query_once_and_the_longest_first():
    spans = documents(1, 300, 128, 70)
    tiles = query_tiles(spans).tolist()
    assert len(tiles) == 6
    assert key_ranges([tuple(tile) for tile in sorted(tiles)]).equal(key_ranges(spans))
    keys = [stop - first for _, _, first, stop in tiles]
    assert keys == sorted(keys, reverse=True)
    query = torch.empty(8, 1, 4, 192)
    for wrong in (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 4)):
        with pytest.raises(
            ValueError, match=r"it is torch.int32 \[n, 4\] on cpu, from query_tiles"
        ):
            ops._check_tiles(wrong, query)


@pytest.mark.parametrize(
    ("spans", "way"),
    [
        (documents(*[1000] * 16), "tiles"),
        (documents(*[5] * 100), "ranges"),  # 100 programs of a tile, or 4
        (((0, 8192, 0, 8192), (8192, 16384, 0, 32768)), "ranges"),  # a rank's share of one document
        (documents(*[512] * 4), "ranges"),  # the same programs and tiles
        (((0, 200, 0, 2200), (200, 400, 2200, 4400)), "tiles"),  # or one program reads all keys
    ],
)
def test_documents_are_read_by_whichever_way_makes_less_work(spans, way):
    (made,) = reads_of(spans).items()
    assert made[0] == way
    assert made[1].equal(query_tiles(spans) if way == "tiles" else key_ranges(spans))


def test_what_queries_read_is_said_once():
    query, tiles = torch.empty(8, 1, 4, 192), torch.zeros(1, 4, dtype=torch.int32)
    for given in ((None, tiles, False), (torch.zeros(2, 8, dtype=torch.int32), tiles, True)):
        with pytest.raises(ValueError, match="are given: leave all but one out"):
            ops._reads(query, *given)


@pytest.mark.parametrize(
    "tile",
    [(-5, 2**30, 80, 3), (60, 10, 0, 90), (0, 64, 85, 90), (64, 70, -3, 2**30), (69, 70, 89, 0)],
)
def test_tiles_that_cannot_be_neither_wait_for_ever_nor_read_on(tile):
    s, t, generator = 70, 90, torch.Generator().manual_seed(1)
    query, key = (torch.randn(n, 1, 48, generator=generator) for n in (s, t))
    grad, grad_query, grad_key = query[..., :32].clone(), query * 0, key * 0

    def rows(x, count, columns):
        return Descriptor(x.flatten(1), count, columns)

    launch(
        backward_kernel.latent_attention_backward, (1, 1), lazy=True, warps=4,
        q_nope_desc=rows(query, 32, 32), q_rope_desc=rows(query, 32, 16),
        key_nope_desc=rows(key, 32, 32), key_rope_desc=rows(key, 32, 16),
        do_desc=rows(grad, 32, 32), dq_nope_desc=rows(grad_query, 32, 32),
        dq_rope_desc=rows(grad_query, 32, 16), dkey_nope_desc=rows(grad_key, 32, 32),
        dkey_rope_desc=rows(grad_key, 32, 16), dq_ptr=Pointer(grad_query), ranges_ptr=None,
        lse_ptr=Pointer(torch.zeros(1, 1, s)), delta_ptr=Pointer(torch.zeros(1, 1, s)),
        tiles_ptr=Pointer(torch.tensor([tile])), s=s, t=t, past=None, scale=0.1, log2_scale=0.1,
        P=1, G=1, L=32, R=16, M=64, N=32, RANGES=False, TILES=True,
    )  # fmt: skip
    assert grad_query.isfinite().all() and grad_key.isfinite().all()


def test_what_begins_between_two_multiples_of_16_bytes_is_copied():
    """The copy engine refuses it, though it is contiguous."""
    memory = torch.arange(4 * 96 + 8).half()
    for first in (0, 1, 8):
        x = memory[first : first + 4 * 96].view(4, 1, 1, 96)
        whole = ops._whole(x)
        assert torch.equal(whole, x) and (whole is x) == (first != 1)
        assert ops._rows(whole, 64, 32).shape == [4, 96]
