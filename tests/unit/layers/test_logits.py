"""The largest logit of every branch and head against the oracle, and what QK-clip makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_mlra.layers.logits import row_factors
from megatron_mlra.maths.logits import largest_logits, shrink
from megatron_mlra.sharding.token_plan import plan_tokens
from megatron_mlra.training.logits import scale_rows
from support.modules import BATCH, FORMS, MLRA2, TOKENS, VARIANTS, build, named
from support.oracle import OracleConfig, reference
from unit.layers.test_packed_sequences import packing

TOLERANCE = 1e-5
RECOMPUTE = {
    "none": {},
    "core": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "up-projection": {"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]},
}


def seen(attention, x, *args, **named_args) -> torch.Tensor:
    """`[n, h]`: what the core reports of a training pass, forward and backward."""
    largest = attention.core_attention.largest
    largest.wanted = True
    x = x.float().requires_grad_()
    attention(x, *args, **named_args)[0].square().sum().backward()
    return largest.take().view(attention.shard.branches, attention.shard.heads)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_branch_and_head(variant, form, recompute, groups):
    case = VARIANTS[variant]
    expected = reference(case, TOKENS, BATCH)
    options = {"core_form": form} | RECOMPUTE[recompute]
    attention = build(case, groups, expected.parameters, **options)
    found = seen(attention, expected.x, None)
    assert torch.allclose(found, expected.largest, rtol=TOLERANCE, atol=TOLERANCE)


def test_recomputation_does_not_look_again(groups, monkeypatch):
    from megatron_mlra.layers import core_attention

    looks = []

    def look(*args):
        looks.append(1)
        return largest_logits(*args)

    monkeypatch.setattr(core_attention, "largest_logits", look)
    expected = reference(MLRA2, TOKENS, BATCH)
    attention = build(MLRA2, groups, expected.parameters, **RECOMPUTE["core"])
    seen(attention, expected.x, None)
    assert len(looks) == 1


def test_evaluation_is_not_measured(groups):
    expected = reference(MLRA2, TOKENS, BATCH)
    attention = build(MLRA2, groups, expected.parameters)
    attention.core_attention.largest.wanted = True
    attention.eval()
    attention(expected.x.float(), None)
    assert attention.core_attention.largest.take() is None


@pytest.mark.parametrize("form", FORMS)
def test_documents_are_kept_apart(form, groups):
    documents = (1, 3, 5)
    expected = reference(MLRA2, TOKENS, 1, documents)
    attention = build(MLRA2, groups, expected.parameters, core_form=form)
    packed = seen(attention, expected.x, None, packed_seq_params=packing(0, 1, 4, 9))
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in documents)) == 0
    masked = seen(attention, expected.x, mask[None, None])
    whole = reference(MLRA2, TOKENS, 1).largest
    for found in (packed, masked):
        assert torch.allclose(found, expected.largest, rtol=TOLERANCE, atol=TOLERANCE)
        assert not torch.allclose(found, whole, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("scores", [1, 40, 2**24])
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_blocks_of_queries_find_what_the_whole_does(scores, cp, monkeypatch):
    monkeypatch.setattr("megatron_mlra.maths.logits.SCORES", scores)
    draw = torch.Generator().manual_seed(3)
    s, t = 32 // cp, 32
    for rank in range(cp):
        query, key = (
            torch.randn(s, 2, 6, 5, generator=draw),
            torch.randn(t, 2, 3, 5, generator=draw),
        )
        plan = plan_tokens(s, cp, rank, packing(0, 5, 20, 32), torch.device("cpu"))
        every = torch.einsum("sbhd,tbhd->bhst", query, key.repeat_interleave(2, 2)) * 0.7
        read = torch.zeros(s, t, dtype=torch.bool)
        for a, b, start, stop in plan.spans:
            for i in range(a, b):
                read[i, start : stop - (b - 1 - i)] = True
        wanted = every.masked_fill(~read, -torch.inf).amax((0, 2, 3))
        found = largest_logits(query, key, 0.7, plan.spans)
        assert torch.allclose(found, wanted, rtol=1e-6)
        assert torch.allclose(largest_logits(query, key, 0.7, allowed=read[None, None]), wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [0.5, 0.3])
@pytest.mark.parametrize(
    "case",
    [
        *VARIANTS.values(),
        replace(MLRA2, q_rank=None),
        replace(MLRA2, gate=True),
        replace(VARIANTS["GLA-4"], qk_rope=0),
        replace(MLRA2, head_norm=True),
        replace(MLRA2, head_norm=True, q_rank=None),
    ],
    ids=[
        *VARIANTS,
        *("MLRA-2 without a query latent", "MLRA-2 gated", "GLA-4 without RoPE"),
        *("MLRA-2 with a norm of heads", "MLRA-2 with it and without a query latent"),
    ],
)
def test_a_clip_ends_at_the_threshold(case: OracleConfig, alpha, form, groups):
    expected = reference(case, TOKENS, BATCH)
    attention = build(case, groups, expected.parameters, core_form=form)
    before = {name: p.detach().clone() for name, p in named(attention).items()}
    of_heads = expected.largest.amax(0)
    threshold = float(of_heads.sort().values[-2:].mean())  # the largest head alone exceeds it
    head = int(of_heads.argmax())
    has_rope = case.qk_rope > 0
    factors = shrink(seen(attention, expected.x, None), threshold, alpha, has_rope)
    assert int((factors.key < 1).any(0).sum()) == 1
    for weight, rows in row_factors(attention, factors):
        scale_rows(weight, rows, None)

    after = seen(attention, expected.x, None)
    assert float(after.max()) == pytest.approx(threshold, rel=TOLERANCE)
    gamma = threshold / float(of_heads[head])
    wanted = expected.largest.clone()
    wanted[:, head] *= gamma  # each branch alike
    assert torch.allclose(after, wanted, rtol=TOLERANCE, atol=TOLERANCE)

    query = "linear_q_proj" if case.q_rank is None else "linear_q_up_proj"
    if case.head_norm:
        query = "query_head_norm"
    for name, p in named(attention).items():
        was, now = before[name], p.detach()
        if name == query:
            was, now = (x.view(case.heads, case.qk_nope + case.qk_rope, -1) for x in (was, now))
            nope, rope = (slice(0, case.qk_nope), slice(case.qk_nope, None))
            assert torch.allclose(now[head, nope], was[head, nope] * gamma**alpha)
            assert torch.allclose(now[head, rope], was[head, rope] * gamma)
            others = [i for i in range(case.heads) if i != head]
            assert torch.equal(now[others], was[others])
        elif name == "linear_kv_up_proj":
            others = [i for i in range(case.heads) if i != head]
            assert torch.equal(now[:, others], was[:, others])
            assert torch.equal(now[:, head, case.qk_nope :], was[:, head, case.qk_nope :])
            keys = was[:, head, : case.qk_nope] * gamma ** (1 - alpha)
            assert torch.allclose(now[:, head, : case.qk_nope], keys)
        else:
            assert torch.equal(now, was), name


def test_a_norm_of_query_heads_bounds_every_logit(groups):
    """docs/stability.md's bound, which knows nothing of the queries' projection."""
    case = replace(MLRA2, head_norm=True)
    expected = reference(case, TOKENS, BATCH)
    p, width = expected.parameters, case.qk_nope + case.qk_rope
    grown = p | {"linear_q_up_proj": 1e3 * p["linear_q_up_proj"]}
    found = seen(build(case, groups, grown), expected.x, None)
    assert torch.allclose(found, expected.largest, rtol=1e-3, atol=1e-3)

    g = p["query_head_norm"].abs().view(case.heads, width).amax(1)
    keys = p["linear_kv_up_proj"][:, :, : case.qk_nope]  # [N, h, d_h, d_l]
    gains = torch.linalg.matrix_norm(keys, 2)  # [N, h]
    norms = p["kv_norm"].abs().view(case.branches, case.groups, -1).amax(2)
    latents = (case.hidden**0.5 * norms).repeat_interleave(case.heads_per_latent, 1)
    rope = (expected.x @ p["linear_kv_down_proj"][case.kv_rank :].T).norm(dim=-1).max()
    bound = g * ((gains * latents).square() + rope.square()).sqrt()
    assert (found <= bound).all()
    plain = {name: weight for name, weight in grown.items() if name != "query_head_norm"}
    assert (seen(build(MLRA2, groups, plain), expected.x, None) > bound).all()


@pytest.mark.parametrize("threshold", ["of one branch", "of all"])
def test_without_rope_a_branch_is_clipped_by_itself(threshold, groups):
    case = replace(VARIANTS["MLRA-4"], qk_rope=0)
    expected = reference(case, TOKENS, BATCH)
    attention = build(case, groups, expected.parameters)
    largest = expected.largest
    ordered = largest.flatten().sort().values
    tau = float(ordered[-2:].mean() if threshold == "of one branch" else 0.9 * ordered[0])
    assert tau > 0
    before = {name: p.detach().clone() for name, p in named(attention).items()}
    factors = shrink(seen(attention, expected.x, None), tau, 0.5, has_rope=False)
    for weight, rows in row_factors(attention, factors):
        scale_rows(weight, rows, None)
    after = seen(attention, expected.x, None)
    assert torch.allclose(after, largest.clamp(max=tau), rtol=TOLERANCE)
    found = named(attention)
    up, query = found["linear_kv_up_proj"].detach(), found["linear_q_up_proj"].detach()
    if threshold == "of one branch":
        kept = largest < tau
        assert int((~kept).sum()) == 1
        assert torch.equal(up[kept], before["linear_kv_up_proj"][kept])
        assert torch.equal(query, before["linear_q_up_proj"])
    else:
        # A branch that shrinks least shares with the query as the paper's head does.
        heads = query.view(case.heads, case.qk_nope, -1)
        was = before["linear_q_up_proj"].view_as(heads)
        for head in range(case.heads):
            gamma = float((tau / largest[:, head]).max())
            assert torch.allclose(heads[head], was[head] * gamma**0.5)
        assert (factors.key <= 1).all()


def test_what_is_not_finite_is_left_alone():
    assert shrink(torch.tensor([[1.0, 2.0], [99.0, -3.0]]), 100, 0.5) is None
    for bad in (float("nan"), float("inf")):
        factors = shrink(torch.tensor([[bad, 200.0], [3.0, 50.0]]), 100, 0.5)
        assert factors.rope.tolist() == [1.0, 0.5]
