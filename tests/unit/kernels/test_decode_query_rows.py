"""The Hopper kernel of many query rows, emulated on the CPU.

Rows of several query tokens share tiles: row r of query token i = r // heads sees all but the last
q - 1 - i tokens.
"""

import itertools
import math

import pytest
import torch

from mlra_kernels.latent_decode.configs import DecodeConfig, default_config, shared_config
from mlra_kernels.latent_decode.hopper_rows_kernel import latent_decode_hopper_rows_kernel
from mlra_kernels.latent_decode.reference import FP8_DTYPE, latent_decode_reference
from support.emulated import launch
from support.emulated_memory import Descriptor, Pointer
from support.paged import paged_case

M, N, PAGE, D, R = 16, 16, 32, 32, 16
LENGTHS = [130, 1, 0, 64, 47, 5]
SCALE = 0.3


def cut(lengths, cuts):
    """A schedule whose ranges end at `cuts` on the line of all tiles, and each sequence's first
    slot and number of parts; a part's slot is program + sequence."""
    tiles = [-(-n // N) for n in lengths]
    starts = [sum(tiles[:b]) for b in range(len(tiles) + 1)]
    bounds = [0, *cuts, starts[-1]]
    schedule, splits = [], [[0, 0] for _ in tiles]
    for program, (first, last) in enumerate(itertools.pairwise(bounds)):
        b = next((b for b, end in enumerate(starts[1:]) if end > first), len(tiles))
        length = lengths[b] if b < len(tiles) else 0
        schedule.append((b, first - starts[b], last - first, length))
        for s, (begin, end) in enumerate(itertools.pairwise(starts)):
            if max(first, begin) < min(last, end):
                splits[s] = [splits[s][0] if splits[s][1] else program + s, splits[s][1] + 1]
    return torch.tensor(schedule, dtype=torch.int32), splits


def quantised(cache, latents):
    """The FP8 form of a cache: bits `[pages, page, L * D]`, scales `[pages, L, page]`, and what
    they stand for; NaN where nothing is stored."""
    x = cache[..., : latents * D].unflatten(-1, (latents, D))
    scale = x.abs().amax(-1) / 448
    bits = (x / scale[..., None]).to(FP8_DTYPE)
    stood = torch.cat((bits.float() * scale[..., None]).flatten(-2).split(latents * D, -1), -1)
    return bits.flatten(-2), scale.transpose(1, 2).contiguous(), stood


def decode(case, *, consumers, stages, lazy, fp8, overlap, query_registers, cuts, branches=1):
    """Run the kernel on the emulator; return out, lse and what they should be."""
    q, r, cache, table, lens = case
    batch, q_len, latents, heads, _ = q.shape
    pages, rows, lengths = cache.shape[0], q_len * heads, lens.tolist()
    schedule, splits = cut(lengths, cuts)
    programs = len(schedule)
    latent_rows, rope_rows = cache[..., : latents * D], cache[..., latents * D :]
    scale_rows = torch.zeros(pages * latents, PAGE)
    if fp8:
        bits, scale, stood = quantised(cache, latents)
        rope_rows = rope_rows.bfloat16()
        cache = torch.cat((stood, rope_rows.float()), -1)
        latent_rows, scale_rows = bits, scale.view(pages * latents, PAGE)
    out, lse = torch.full(q.shape, math.nan), torch.full(q.shape[:-1], math.nan)
    part_out = torch.full((programs + batch, latents, rows, D), math.nan)
    part_lse = torch.full((programs + batch, latents, rows), math.nan)
    blocks = -(-rows // (M * consumers))
    launch(
        latent_decode_hopper_rows_kernel, (blocks * latents, programs), lazy=lazy, warps=4,
        q_ptr=Pointer(q), q_rope_ptr=Pointer(r),
        c_desc=Descriptor(latent_rows.reshape(pages * PAGE, latents * D).contiguous(), N, D),
        r_desc=Descriptor(rope_rows.reshape(pages * PAGE, R).contiguous(), N, R),
        s_desc=Descriptor(scale_rows, 1, N), table_ptr=Pointer(table), seqlens_ptr=Pointer(lens),
        schedule_ptr=Pointer(schedule), out_ptr=Pointer(out), lse_ptr=Pointer(lse),
        part_out_ptr=Pointer(part_out), part_lse_ptr=Pointer(part_lse),
        scale_log2=SCALE * math.log2(math.e), stride_qb=q.stride(0), stride_qq=q.stride(1),
        stride_ql=q.stride(2), stride_qj=q.stride(3), stride_qrb=r.stride(0),
        stride_qrq=r.stride(1), stride_qrh=r.stride(2), stride_tb=table.stride(0),
        max_tiles=table.shape[1] * PAGE // N, Q_LEN=q_len, HEADS=heads, LATENTS=latents,
        GROUPS=latents // branches, M=M, N=N, D=D, R=R, PAGE=PAGE, FP8=fp8, STAGES=stages,
        W=consumers, CONSUMER_REGS=160, OVERLAP=overlap, Q_REGS=query_registers,
    )  # fmt: skip
    for b, (slot, count) in enumerate(splits):
        if count != 1:
            shape = (count, latents, q_len, heads)
            some = part_lse[slot : slot + count].view(shape).transpose(1, 2) / math.log2(math.e)
            lse[b] = some.logsumexp(0) if count else -math.inf
            weights = (some - lse[b]).exp().nan_to_num(0.0)
            values = part_out[slot : slot + count].view(*shape, D).transpose(1, 2)
            out[b] = (values * weights[..., None]).sum(0)
    return out, lse, latent_decode_reference(q, r, cache, table, lens, SCALE, branches)


QUERIES = [
    # q, heads, latents, branches, consumers, FP8 too
    (2, 12, 1, 1, 2, True),
    (4, 12, 1, 1, 3, False),
    (8, 5, 2, 2, 3, False),
    (4, 10, 2, 1, 2, False),  # rows of two programs
    (1, 33, 1, 1, 3, False),
]


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("overlap", [False, True], ids=["in_turn", "overlap"])
@pytest.mark.parametrize(("q_len", "heads", "latents", "branches", "consumers", "narrow"), QUERIES)
def test_rows_of_all_queries(q_len, heads, latents, branches, consumers, narrow, overlap, lazy):
    case = paged_case(
        LENGTHS, q_len=q_len, latents=latents, branches=branches, heads=heads, dim=D, rope=R,
        page=PAGE, dtype=torch.float32,
    )  # fmt: skip
    for fp8 in (False, True) if narrow else (False,):
        out, lse, (want, want_lse) = decode(
            case, consumers=consumers, stages=2 + 2 * lazy, lazy=lazy, fp8=fp8, overlap=overlap,
            query_registers=lazy, cuts=[3, 4, 11], branches=branches,
        )  # fmt: skip
        error = ((out - want).norm() / want.norm()).item()
        assert error < (2e-3 if fp8 else 1e-5)
        torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=5e-3 if fp8 else 1e-4)


def test_configurations_by_rows():
    """Three consumers where two would leave a block of 64 rows empty; FP8 keeps to pairs."""
    for rows, fp8, consumers, programs in (
        (96, False, 2, 1), (192, False, 3, 1), (256, False, 2, 2), (512, False, 2, 4),
        (320, False, 2, 3), (96, True, 2, 1), (512, True, 2, 4),
    ):  # fmt: skip
        config = shared_config(rows, fp8)
        assert (config.consumers, config.row_blocks(rows)) == (consumers, programs)
    assert shared_config(192, True) is None
    assert default_config(96, 128, 2, 64, True) == DecodeConfig(
        64, 64, 4, 4, 1, hopper=True, consumers=2, registers=136
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"consumers": 1}, "use True, 2 or 3, and 2 or more"),
        ({"hopper": False}, "shared_tiles with hopper=False"),
        ({"shared_tiles": False, "overlap": True}, "set that to True"),
    ],
)
def test_configurations_that_cannot_run_are_refused(changes, said):
    right = {"consumers": 2, "hopper": True, "shared_tiles": True}
    with pytest.raises(ValueError, match=said):
        DecodeConfig(64, 64, 4, 4, 1, **(right | changes))
