"""The Triton kernels under Triton's interpreter, on the CPU, against the references.

Triton fixes at import whether it interprets, so this file runs itself in a child process with
TRITON_INTERPRET=1: other tests of the session keep their own Triton.
"""

import math

import pytest
import torch

from support.interpreted import INTERPRETING, run_interpreted

if not INTERPRETING:

    def test_kernels_under_the_interpreter():
        printed = run_interpreted(__file__)
        assert " passed" in printed and "skipped" not in printed

else:
    from mlra_kernels.latent_decode import (
        decode_metadata,
        latent_cache_append,
        latent_decode,
        merge_states,
        rope_tables,
    )
    from mlra_kernels.latent_decode.reference import FP8_DTYPE, split_cache
    from support.paged import paged_case

    pytestmark = [
        pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
        for what in ("divide by zero", "invalid value", "All-NaN slice")
    ]

    def metadata_for(case, deterministic=False):
        q, _, cache, _, lens = case
        return decode_metadata(
            lens,
            q_len=q.shape[1],
            num_latents=q.shape[2],
            heads_per_latent=q.shape[3],
            latent_dim=q.shape[4],
            cache_dtype=cache.dtype,
            page_size=cache.shape[1],
            deterministic=deterministic,
        )

    def check(case, branches, *, rtol, cache_scale=None, deterministic=False):
        """Compare out and lse of both backends, with and without given metadata."""
        want_out, want_lse = latent_decode(
            *case, 0.1, num_branches=branches, cache_scale=cache_scale, backend="torch"
        )
        metadata = metadata_for(case, deterministic)
        out, lse = latent_decode(
            *case, 0.1, num_branches=branches, cache_scale=cache_scale, metadata=metadata
        )
        assert torch.isfinite(out).all()
        error = (out.double() - want_out.double()).norm() / want_out.double().norm()
        assert error < rtol, f"relative error {error:.2e}"
        torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=2e-3)
        return out

    BASE = {"q_len": 1, "latents": 1, "branches": 1, "heads": 6, "dim": 64, "rope": 32, "page": 64}

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"page": 16},
            {"page": 48},
            {"page": 128},
            {"heads": 1},
            {"heads": 24, "dim": 128, "rope": 64},
            {"heads": 48},
            {"heads": 65},
            {"latents": 2, "heads": 8},
            {"latents": 4, "branches": 2, "heads": 3},
            {"latents": 4, "branches": 4, "heads": 3},
            {"q_len": 2},
            {"q_len": 8, "heads": 3, "page": 16},
            {"dim": 256, "rope": 64},
            {"dim": 512, "rope": 64},
        ],
        ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items()) or "base",
    )
    def test_decode(changes):
        case = paged_case([300, 0, 64, 1], dtype=torch.float16, **{**BASE, **changes})
        check(case, changes.get("branches", 1), rtol=2e-3)

    def test_decode_one_long_sequence_is_split():
        case = paged_case([2000], dtype=torch.float16, **BASE)
        assert metadata_for(case).splits[0, 1] > 1
        check(case, 1, rtol=2e-3)

    def test_decode_cut_for_a_blackwell_gpu(monkeypatch):
        """A rank of MLRA-4 at TP4 in the portable kernel, scheduled for 148 multiprocessors."""
        from mlra_kernels.latent_decode import metadata

        monkeypatch.setattr(metadata, "sm_count", lambda device: 148)
        sizes = {**BASE, "heads": 64, "dim": 128, "rope": 64}
        case = paged_case([300], dtype=torch.float16, **sizes)
        made = metadata_for(case)
        assert not made.config.hopper and made.schedule.shape[0] == 2 * 148
        check(case, 1, rtol=2e-3)

    @pytest.mark.parametrize("changes", [{}, {"latents": 4, "branches": 2, "heads": 3, "q_len": 2}])
    def test_decode_bf16(changes):
        case = paged_case([2000, 0, 65], dtype=torch.bfloat16, **{**BASE, **changes})
        check(case, changes.get("branches", 1), rtol=1e-2)

    def test_decode_fp32_is_exact_to_rounding():
        case = paged_case([700, 65, 0], dtype=torch.float32, **{**BASE, "q_len": 2, "latents": 2})
        check(case, 1, rtol=1e-5)

    def test_compiled_call_is_traced_whole():
        """torch.compile sees operators only, the schedule made on the way included."""
        case = paged_case([70, 5], dtype=torch.float16, **BASE)

        def step(*arguments):
            return latent_decode(*arguments, 0.1, num_branches=1)[0] + 1

        compiled = torch.compile(step, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*case), step(*case))

    def test_all_sequences_empty():
        case = paged_case([64, 64], dtype=torch.float16, **BASE)
        case[4].zero_()
        out, lse = latent_decode(*case, 0.1, num_branches=1)
        assert (out == 0).all() and (lse == -math.inf).all()

    def test_lengths_that_cannot_be_give_nan_and_spare_the_others():
        case = paged_case([70, 64, 130, 5], dtype=torch.float16, **BASE)
        want, _ = latent_decode(*case, 0.1, num_branches=1, backend="torch")
        capacity = case[3].shape[1] * 64
        for wrong in (-1, capacity + 1, 2**31 - 1):
            lengths = case[4].clone()
            lengths[1] = wrong
            out, lse = latent_decode(*case[:4], lengths, 0.1, num_branches=1)
            assert out[1].isnan().all() and lse[1].isnan().all()
            torch.testing.assert_close(out[::2], want[::2], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(out[3], want[3], rtol=2e-3, atol=2e-3)

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_metadata_of_other_lengths_gives_nan(deterministic):
        case = paged_case([700, 64, 5, 130], dtype=torch.float16, **BASE)
        metadata = metadata_for(case, deterministic)
        case[4][1:3] = torch.tensor([63, 6])
        out, lse = latent_decode(*case, 0.1, num_branches=1, metadata=metadata)
        assert out[1:3].isnan().all() and lse[1:3].isnan().all()
        assert not out[::3].isnan().any()
        metadata.update(case[4])
        out, _ = latent_decode(*case, 0.1, num_branches=1, metadata=metadata)
        assert not out[1].isnan().any()

    def test_views_whose_addresses_need_64_bits_are_refused():
        """Of memory that nobody touches; a batch may reach as far as it likes."""
        q, r, cache, table, lens = paged_case([70], dtype=torch.float16, **BASE)
        memory = torch.empty(2**31 + 2**20, dtype=torch.float16)
        far = {
            "q_absorbed": memory.as_strided(q.shape, (0, 0, 0, 2**31 // 5 + 1, 1)),
            "q_rope": memory.as_strided(r.shape, (0, 0, 2**31 // 5 + 1, 1)),
            "cache": memory.as_strided(cache.shape, (0, 2**31 // 63 + 1, 1)),
        }
        right = dict(zip(far, (q, r, cache), strict=True))
        for name, view in far.items():
            with pytest.raises(ValueError, match=rf"of {name} reaches over 2\^31 numbers of mem"):
                latent_decode(*(right | {name: view}).values(), table, lens, 0.1, num_branches=1)
        wide = memory.as_strided((2, *q.shape[1:]), (2**31, *q.stride()[1:]))
        wide[:] = q
        two = (wide, r.expand(2, -1, -1, -1), cache, table.repeat(2, 1), lens.repeat(2))
        found, _ = latent_decode(*two, 0.1, num_branches=1)
        want, _ = latent_decode(q, r, cache, table, lens, 0.1, num_branches=1)
        torch.testing.assert_close(found, want.repeat(2, 1, 1, 1, 1), rtol=2e-3, atol=2e-3)

    def test_an_empty_batch_has_an_empty_result():
        q, r, cache, table, lens = paged_case([70], dtype=torch.float16, **BASE)
        empty = (q[:0], r[:0], cache, table[:0], lens[:0])
        metadata = metadata_for(empty)
        for options in ({}, {"metadata": metadata}, {"backend": "torch"}):
            out, lse = latent_decode(*empty, 0.1, num_branches=1, **options)
            assert out.shape == (0, *q.shape[1:]) and lse.shape == (0, *q.shape[1:4])

    def test_metadata_is_of_one_shape_and_one_kind_of_lengths():
        case = paged_case([70], dtype=torch.float16, **BASE)
        metadata = metadata_for(case)
        other = paged_case([70], dtype=torch.float16, **{**BASE, "heads": 3})
        with pytest.raises(ValueError, match="made for heads_per_latent 6, this call has 3"):
            latent_decode(*other, 0.1, num_branches=1, metadata=metadata)
        for wrong, said in (
            (case[4].long(), "cache_seqlens is torch.int64: use torch.int32"),
            (case[4].to("meta"), "metadata is on cpu, cache_seqlens on meta"),
            (torch.zeros(2, dtype=torch.int32), "call decode_metadata again"),
        ):
            with pytest.raises(ValueError, match=said):
                metadata.update(wrong)

    @pytest.mark.parametrize("length", [100, 2000], ids=["whole", "split"])
    @pytest.mark.parametrize("backend", ["torch", "mlra_kernels"])
    def test_what_is_not_finite_shows_in_the_rows_that_see_it(backend, length):
        """Whether the kernels cut the sequence or not."""
        case = paged_case([length, 70], dtype=torch.float16, **{**BASE, "q_len": 2})
        want, _ = latent_decode(*case, 0.1, num_branches=1, backend="torch")
        page = int(case[3][0, (length - 1) // 64])
        for bad in (math.nan, math.inf):
            q = case[0].clone()
            q[0, 0, 0, 3, 7] = bad
            out, _ = latent_decode(q, *case[1:], 0.1, num_branches=1, backend=backend)
            assert out[0, 0, 0, 3].isnan().all()
            torch.testing.assert_close(out[0, 1], want[0, 1], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(out[1], want[1], rtol=2e-3, atol=2e-3)
        # The RoPE key of a sequence's last token, which only the last query token sees.
        cache = case[2].clone()
        cache[page, (length - 1) % 64, -1] = math.nan
        out, lse = latent_decode(
            *case[:2], cache, *case[3:], 0.1, num_branches=1, backend=backend
        )  # fmt: skip
        assert out[0, 1].isnan().all() and lse[0, 1].isnan().all()
        torch.testing.assert_close(out[1], want[1], rtol=2e-3, atol=2e-3)

    @pytest.mark.parametrize("backend", ["torch", "mlra_kernels"])
    def test_merging_keeps_what_is_not_a_number(backend):
        gen = torch.Generator().manual_seed(8)
        outs, lses = torch.randn(6, 5, 20, generator=gen), torch.randn(6, 5, generator=gen)
        for row, bad in enumerate((math.nan, math.inf)):
            lses[4, row] = bad
        outs[1, 2] = math.nan
        out, lse = merge_states(outs, lses, backend=backend)
        assert out[:3].isnan().all() and not lse[:2].isfinite().any()
        assert out[3:].isfinite().all() and lse[2:].isfinite().all()

    def test_slots_behind_the_cache_write_nothing():
        memory = torch.zeros(6, 16, 96, dtype=torch.float16)
        cache, slots = memory[:2], torch.tensor([32, 3, 95, 2**31 - 1, -1])
        kv, (cos, sin) = torch.randn(5, 96).half(), rope_tables(8, 32)
        latent_cache_append(
            kv, torch.ones(1, 64), cos, sin, torch.arange(5), slots, cache,
            latent_scale=1.0, norm_eps=1e-6,
        )  # fmt: skip
        assert memory.flatten(0, 1).any(-1).nonzero().flatten().tolist() == [3]

    def test_deterministic_result_does_not_depend_on_the_batch():
        lengths = [1500, 64, 700]
        case = paged_case(lengths, dtype=torch.float16, **BASE)
        together = check(case, 1, rtol=2e-3, deterministic=True)
        for b in range(len(lengths)):
            q, r, cache, table, lens = case
            alone = (q[b : b + 1], r[b : b + 1], cache, table[b : b + 1], lens[b : b + 1])
            assert torch.equal(check(alone, 1, rtol=2e-3, deterministic=True), together[b : b + 1])

    def test_schedule_covers_every_tile_once_and_follows_new_lengths():
        case = paged_case([64] * 5, dtype=torch.float16, **BASE)
        metadata = metadata_for(case)
        for lengths in ([64] * 5, [0, 5000, 1, 129, 0], [0] * 5, [640, 0, 0, 0, 64]):
            metadata.update(torch.tensor(lengths, dtype=torch.int32))
            seen = [[] for _ in lengths]
            for b, tile, count, length in metadata.schedule.tolist():
                while count > 0:
                    tiles = -(-lengths[b] // 64)
                    assert length == lengths[b] or tile == 0
                    take = min(count, tiles - tile)
                    seen[b] += range(tile, tile + take)
                    count, b, tile = count - take, b + 1, 0
            assert seen == [list(range(-(-n // 64))) for n in lengths]

    def append_case(latents, fp8, slots):
        """Raw tokens, and the same cache filled by both backends; unwritten rows stay NaN."""
        dim, rope, page = 64, 32, 16
        gen = torch.Generator().manual_seed(4)
        kv = torch.randn(len(slots), latents * dim + rope, generator=gen).half()
        weight, (cos, sin) = torch.rand(latents, dim, generator=gen) + 0.5, rope_tables(200, rope)
        positions = torch.randint(0, 200, (len(slots),), generator=gen)
        shape = (7, page, latents * dim + rope * (2 if fp8 else 1))
        filled = []
        for backend in ("torch", "mlra_kernels"):
            cache = torch.full(shape, 0x7F, dtype=torch.uint8).view(FP8_DTYPE)  # NaN
            cache = cache if fp8 else cache.to(torch.float16)
            scale = torch.full((7, latents, page), math.nan) if fp8 else None
            latent_cache_append(
                kv, weight, cos, sin, positions, slots, cache,
                latent_scale=1.7, norm_eps=1e-6, cache_scale=scale, backend=backend,
            )  # fmt: skip
            filled.append((cache, scale))
        return filled

    @pytest.mark.parametrize("latents", [1, 4])
    @pytest.mark.parametrize("fp8", [False, True])
    def test_append_writes_what_the_reference_writes(latents, fp8):
        slots = torch.randperm(7 * 16, generator=torch.Generator().manual_seed(6))[:90].int()
        slots[::7] = -1
        (want, want_scale), (got, got_scale) = append_case(latents, fp8, slots)
        if fp8:
            torch.testing.assert_close(got_scale, want_scale, rtol=1e-6, atol=0, equal_nan=True)
            # The interpreter's cast to e4m3 does not round like a GPU's, and loses the carry into
            # the exponent: most numbers must agree to one step here, every one must on a GPU.
            step = want.view(torch.uint8).int() - got.view(torch.uint8).int()
            assert (step[..., : latents * 64].abs() <= 1).float().mean() > 0.95
            want, got = split_cache(want, 32)[1], split_cache(got, 32)[1]
        torch.testing.assert_close(got, want, rtol=1e-2, atol=2e-3, equal_nan=True)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("backend", ["torch", "mlra_kernels"])
    def test_fp8_append_keeps_what_is_not_a_number(backend, bad):
        cache = torch.zeros(1, 16, 64 + 2 * 32, dtype=torch.uint8).view(FP8_DTYPE)
        scale, (cos, sin) = torch.ones(1, 1, 16), rope_tables(8, 32)
        kv = torch.randn(2, 96)
        kv[1, 5] = bad
        latent_cache_append(
            kv, torch.ones(1, 64), cos, sin, torch.arange(2), torch.arange(2), cache,
            latent_scale=1.0, norm_eps=1e-6, cache_scale=scale, backend=backend,
        )  # fmt: skip
        read = cache[0, :2, :64].float() * scale[0, 0, :2, None]
        assert read[0].isfinite().all() and read[1, 5].isnan()

    @pytest.mark.parametrize("q_len", [1, 2])
    @pytest.mark.parametrize(("latents", "branches"), [(1, 1), (4, 2)])
    def test_decode_fp8_cache(latents, branches, q_len):
        cache, scale = append_case(latents, True, torch.arange(90))[0]
        gen = torch.Generator().manual_seed(7)
        q = torch.randn(2, q_len, latents, 5, 64, generator=gen).half()
        r = torch.randn(2, q_len, latents // branches * 5, 32, generator=gen).half()
        table = torch.full((2, 7), 2**31 - 1, dtype=torch.int32)
        table[0, :6], table[1, :3] = torch.arange(6), torch.arange(3)
        lens = torch.tensor([90, 41], dtype=torch.int32)
        check((q, r, cache, table, lens), branches, rtol=2e-3, cache_scale=scale)

    @pytest.mark.parametrize(("sets", "dim"), [(9, 20), (9, 64), (16, 64), (17, 20), (150, 64)])
    def test_merge_states(sets, dim):
        gen = torch.Generator().manual_seed(5)
        outs = torch.randn(sets, 3, 7, dim, generator=gen)
        lses = torch.randn(sets, 3, 7, generator=gen) * 3
        lses[2] = -math.inf
        outs[2] = math.nan
        lses[:, 1, 1] = -math.inf
        got, want = merge_states(outs, lses), merge_states(outs, lses, backend="torch")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
