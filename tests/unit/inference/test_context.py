"""The cut of tokens over ranks and its page accounting, without a process group.

That logits and tokens are those of one rank is tests/distributed/test_context_decoding.py's.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.inference.cache import CacheFull, PagePool
from megatron_mlra.inference.context import TokenCut
from megatron_mlra.inference.load import LoadOptions, load_model
from megatron_mlra.inference.parallel import HeadShard, TensorParallel, check_parallel

SIZES = {
    "num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 88, "num_attention_heads": 8,
    "vocab_size": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "q_lora_rank": 32, "max_position_embeddings": 4096,
}  # fmt: skip


def latent(latents: int, branches: int) -> ModelDescription:
    return ModelDescription(**SIZES, num_latent_heads=latents, num_branches=branches)


def grouped(groups: int) -> ModelDescription:
    sizes = {name: SIZES[name] for name in list(SIZES)[:5]}
    return ModelDescription(**sizes, attention="gqa", num_query_groups=groups, head_dim=16)


@given(st.data())
@settings(deadline=None)
def test_every_token_lies_on_one_rank_and_ranks_hold_equal_numbers(data):
    page_size, ranks = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    pool = PagePool(data.draw(st.integers(1, 12)), page_size, ranks)
    for _ in range(data.draw(st.integers(0, 3))):
        if pool.fits(page_size):
            pool.take(page_size)
    tokens = data.draw(st.integers(1, pool.num_pages * page_size))
    if not pool.fits(tokens):
        with pytest.raises(CacheFull):
            pool.take(tokens)
        return
    pages = pool.take(tokens)
    held = []
    for rank in range(ranks):
        cut = TokenCut(page_size, ranks, rank)
        own, slots = cut.own_pages(pages), [cut.slot(pages, at) for at in range(tokens)]
        # What lies here lies without gaps in this rank's pages, in order.
        here = [slot for slot in slots if slot >= 0]
        dense = [page * page_size + at for page in own for at in range(page_size)]
        assert here == dense[: len(here)]
        assert all(0 <= slot < pool.rank_pages * page_size for slot in here)
        for n in range(tokens + 1):
            assert cut.own_tokens(pages, n) == sum(slot >= 0 for slot in slots[:n])
        held.append(len(here))
    assert sum(held) == tokens
    assert max(held) - min(held) <= page_size


@given(st.data())
@settings(deadline=None)
def test_pages_return_and_what_fits_an_empty_cache_is_taken(data):
    ranks = data.draw(st.integers(1, 5))
    pool = PagePool(data.draw(st.integers(1, 8)), 4, ranks)
    held: list[list[int]] = []
    for tokens in data.draw(st.lists(st.integers(1, 4 * 8 * 5), max_size=20)):
        free = pool.free
        if not pool.ever_fits(tokens):
            assert not pool.fits(tokens)
        elif pool.fits(tokens):
            held.append(pool.take(tokens))
            assert pool.free == free - pool.pages_for(tokens)
        elif held:
            pool.give_back(held.pop(data.draw(st.integers(0, len(held) - 1))))
        flat = [page for pages in held for page in pages]
        assert len(set(flat)) == len(flat) == pool.num_pages - pool.free
    for pages in held:
        pool.give_back(pages)
    assert pool.free == pool.num_pages
    assert pool.take(pool.num_pages * 4) and not pool.free


def test_short_sequences_go_round_the_ranks():
    pool = PagePool(num_pages=3, page_size=16, ranks=4)
    assert [page % 4 for _ in range(12) for page in pool.take(5)] == [0, 1, 2, 3] * 3
    assert not pool.fits(1)


@pytest.mark.parametrize("mode", ["replicated", "sharded"])
@pytest.mark.parametrize(
    ("model", "tp", "context"),
    [
        (latent(4, 4), 4, 2), (latent(4, 4), 2, 2), (latent(4, 2), 4, 2), (latent(4, 1), 1, 8),
        (latent(2, 1), 2, 4), (latent(1, 1), 1, 4), (latent(1, 1), 2, 2),
    ],
)  # fmt: skip
def test_merged_heads_cover_each_branch_once(model, tp, context, mode):
    merged, projected = [], []
    for turn in range(context):
        for rank in range(tp):
            shard = HeadShard.plan(model, tp, rank, mode, context, turn)
            core = shard.core
            for head in range(core.heads)[shard.merged]:
                merged += [(core.branch_start + n, core.head_start + head)
                           for n in range(core.branches)]  # fmt: skip
            # The groups it names are those of its heads, no more.
            each = core.heads // core.groups
            groups = {head // each for head in range(core.heads)[shard.merged]}
            assert groups == set(range(core.groups)[shard.merged_groups])
            projected += range(shard.own_start, shard.own_start + shard.own_heads)
            assert {shard.core.head_start + shard.merged_start} <= set(range(8))
    pairs = [(n, head) for n in range(model.num_branches) for head in range(8)]
    assert sorted(merged) == sorted(pairs)
    if mode == "sharded":
        assert sorted(projected) == list(range(8))


def test_bytes_of_a_rank_fall_by_both_cuts():
    """In units of a head's dims, for latents of one head each and RoPE keys of half of one."""
    for model, tp, context, units in (
        (latent(4, 4), 1, 1, 4.5), (latent(4, 4), 4, 1, 1.5), (latent(4, 4), 4, 2, 0.75),
        (latent(1, 1), 4, 1, 4.5), (latent(1, 1), 1, 4, 4.5 / 4), (latent(1, 1), 1, 8, 4.5 / 8),
        (latent(4, 1), 2, 4, 2.5 / 4),
    ):  # fmt: skip
        options = LoadOptions(cache_tokens=1024, page_size=16)
        parallel = TensorParallel.share(tp, context=context)
        loaded = load_model(model, zeros(model), options, parallel=parallel)
        assert loaded.cache.allocated_bytes == 4 * 1024 * 16 * units
        assert len(loaded.tables[0]) == 1024


def zeros(model: ModelDescription):
    import torch

    from megatron_mlra.description.tensors import expected_tensors

    shapes = expected_tensors(model)
    return lambda name: torch.zeros(shapes[name])


@pytest.mark.parametrize(
    ("model", "tp", "context", "message"),
    [
        (latent(4, 4), 2, 3, "context parallel size 3 does not fit MLRA-4 (8 heads, num_latent_"),
        (latent(1, 1), 8, 2, "at tensor parallel size 8; use one of 1"),
        (latent(4, 1), 1, 16, "use one of 1, 2, 4, 8"),
        (grouped(2), 2, 8, "does not fit GQA (8 heads, num_query_groups 2) at tensor parallel si"),
        (latent(4, 4), 2, 0, "context parallel size is 0; use a whole number of at least 1"),
    ],
)
def test_cuts_that_do_not_fit_name_those_that_do(model, tp, context, message):
    with pytest.raises(ValueError) as refusal:
        check_parallel(model, tp, context)
    assert message in str(refusal.value)
