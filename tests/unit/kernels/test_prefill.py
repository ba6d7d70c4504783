"""Prompts' chunks over a paged cache, against attention written head by head."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from mlra_kernels.latent_attention.reference import latent_attention_reference
from mlra_kernels.prefill import attention_with_lse, prefill_grouped, prefill_latent
from mlra_kernels.prompts import EVERY_BUILD, PromptChunk, plan_prompts

PAGE, PAGES, HEADS, ROPE, SCALE = 16, 40, 8, 8, 0.3
CHUNKS = ((5, 0), (1, 30), (33, 0), (16, 16), (20, 61), (1, 0))
"""(tokens, those in front of them) of six sequences of one step."""
LIMITS = (7, 50, 10_000)
CASES = {  # latents, branches, latent dim, dims of a head's key and value
    "MLRA-4": (4, 4, 16, 24, 24),
    "MLRA-2": (4, 2, 16, 16, 12),
    "MLA": (1, 1, 64, 24, 24),
    "GLA-2": (2, 1, 32, 16, 24),
}


def random_chunks(chunks=CHUNKS):
    order = torch.randperm(PAGES).tolist()
    out = []
    for tokens, start in chunks:
        own = [order.pop() for _ in range(-(-(tokens + start) // PAGE))]
        out.append(PromptChunk(tokens, start, torch.tensor(own, dtype=torch.int32)))
    return out


def cached(data, chunk):
    """Rows of the chunk's sequence, one by one."""
    places = [(int(chunk.pages[i // PAGE]), i % PAGE) for i in range(chunk.start + chunk.tokens)]
    return torch.stack([data[place] for place in places])


def attended(query, keys, values):
    """Of the last tokens of a sequence, each up to itself: `[c, e]` -> `[c, w]`."""
    scores = query @ keys.T * SCALE
    past = len(keys) - len(query)
    unseen = torch.ones_like(scores, dtype=torch.bool).triu(past + 1)
    return torch.softmax(scores.masked_fill(unseen, -torch.inf), 1) @ values


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", CASES)
def test_chunks_attend_to_their_own_sequence_up_to_themselves(name, limit):
    torch.manual_seed(0)
    latents, n, l, d_h, d_v = CASES[name]
    g = latents // n
    data = torch.full((PAGES, PAGE, latents * l + ROPE), float("nan"))
    chunks = random_chunks()
    for chunk in chunks:
        for i in range(chunk.start + chunk.tokens):
            data[chunk.pages[i // PAGE], i % PAGE] = torch.randn(latents * l + ROPE)
    w_uk, w_uv = torch.randn(HEADS, d_h, n * l) / 4, torch.randn(HEADS, n * l, d_v) / 4
    q = torch.randn(sum(chunk.tokens for chunk in chunks), HEADS, d_h + ROPE) / 2
    found = prefill_latent(
        q,
        (data, None),
        plan_prompts(chunks, PAGE, limit),
        w_uk=w_uk,
        w_uv=w_uv,
        rope_dim=ROPE,
        branches=n,
        softmax_scale=SCALE,
    )
    expected, queries = torch.zeros_like(found), q.split([chunk.tokens for chunk in chunks])
    for chunk, own, target in zip(
        chunks, queries, expected.split([chunk.tokens for chunk in chunks]), strict=True
    ):
        rows = cached(data, chunk)
        for head, branch in product(range(HEADS), range(n)):
            latent = branch * g + head * g // HEADS
            c = rows[:, latent * l : (latent + 1) * l]
            part = slice(branch * l, (branch + 1) * l)
            keys = torch.cat((c @ w_uk[head, :, part].T, rows[:, -ROPE:]), 1)
            target[:, head] += attended(own[:, head], keys, c @ w_uv[head, part])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("limit", LIMITS)
def test_grouped_keys_and_values(limit):
    torch.manual_seed(1)
    chunks, groups, dim = random_chunks(), 2, 16
    layer = torch.randn(2, PAGES, PAGE, groups, dim)
    q = torch.randn(sum(chunk.tokens for chunk in chunks), HEADS, dim)
    found = prefill_grouped(q, layer, plan_prompts(chunks, PAGE, limit), SCALE)
    row = 0
    for chunk in chunks:
        keys, values = cached(layer[0], chunk), cached(layer[1], chunk)
        rows = slice(row, row + chunk.tokens)
        for head in range(HEADS):
            group = head * groups // HEADS
            expected = attended(q[rows, head], keys[:, group], values[:, group])
            torch.testing.assert_close(found[rows, head], expected, atol=2e-5, rtol=2e-5)
        row = rows.stop


def test_prompts_of_every_build_read_in_every_way():
    """A server compiles both before requests come."""
    plans = [plan_prompts(random_chunks([(n, 0)] * 2), PAGE, 10_000) for n in EVERY_BUILD]
    assert [[*plan[0].parts[0].reads] for plan in plans] == [["ranges"], ["tiles"]]


@pytest.mark.parametrize(("chunks", "way"), [(CHUNKS, "ranges"), (((250, 0), (250, 50)), "tiles")])
def test_queries_of_a_launch_read_their_own_sequences(chunks, way):
    torch.manual_seed(2)
    (bundle,) = plan_prompts(random_chunks(chunks), PAGE, 10_000)
    (part,) = bundle.parts
    assert list(part.reads) == [way]
    l, pairs, latents = 16, 8, 4
    q = torch.randn(sum(part.queries), pairs, l + ROPE)
    key = torch.randn(sum(part.keys), latents, l + ROPE)
    expected, expected_lse = attention_with_lse(q, key, key[..., :l], SCALE, part)
    out, lse = latent_attention_reference(q[:, None], key[:, None], l, SCALE, **part.reads)
    torch.testing.assert_close(out[:, 0], expected)
    torch.testing.assert_close(lse[0].T, expected_lse)
    if chunks is CHUNKS:
        assert part.offsets[0].tolist() == [0, 5, 6, 39, 55, 75, 76]
        assert part.offsets[1].tolist() == [0, 5, 36, 69, 101, 182, 183]


def test_how_many_launches_a_step_takes():
    chunks = random_chunks()  # 5, 31, 33, 32, 81 and 1 keys
    plans = {limit: plan_prompts(chunks, PAGE, limit) for limit in (183, 182, 69, 40)}
    sizes = {
        limit: [[sum(part.keys) for part in bundle.parts] for bundle in plan]
        for limit, plan in plans.items()
    }
    assert sizes == {
        183: [[183]],
        182: [[182], [1]],
        69: [[69], [32], [12, 69], [1]],
        40: [[36], [33], [32], [40, 1, 40], [1]],
    }
    for plan in plans.values():
        rows = [row for bundle in plan for row in range(76)[bundle.rows]]
        assert rows == list(range(76))


@pytest.mark.parametrize(("tokens", "start"), [(0, 3), (1, -1), (9, 8)])
def test_chunks_that_cannot_be_are_refused(tokens, start):
    chunk = PromptChunk(tokens, start, torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match=f"chunk 0 has {tokens} tokens behind {start} on 1 pages"):
        plan_prompts([chunk], PAGE, 100)
