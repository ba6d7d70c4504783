"""The rule that chooses how layers sum over ranks, with worlds that are only described."""

from types import SimpleNamespace

import pytest
import torch

from megatron_mlra.inference import reduction
from megatron_mlra.inference.parallel import TensorParallel
from megatron_mlra.inference.reduction import Reduction, choose_reduction, one_shot_rows
from mlra_kernels import one_shot

KERNELS, TORCH = SimpleNamespace(name="mlra_kernels"), SimpleNamespace(name="torch")
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def joins(monkeypatch):
    """The calls of `join_peers`, which gives what is appended to `joins.answers`."""
    found = SimpleNamespace(calls=[], answers=[])

    def join(*sizes):
        found.calls.append(sizes)
        answer = found.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(one_shot, "join_peers", join)
    monkeypatch.setattr(reduction.dist, "get_backend", lambda group: "nccl")
    return found


def world(size: int) -> TensorParallel:
    return TensorParallel(size, group=object())


def choose(parallel, name="auto", hidden=3072, device=GPU, ops=KERNELS) -> Reduction:
    return choose_reduction(name, parallel, hidden, torch.bfloat16, device, ops)


def test_no_other_rank_is_no_sum(joins):
    for parallel in (TensorParallel(), TensorParallel.share(4), TensorParallel(1, group=object())):
        for name in reduction.ALL_REDUCES:
            assert choose(parallel, name) == Reduction()
    assert not joins.calls


def test_one_shot_where_memory_can_be_mapped(joins):
    joins.answers += [("peers",), ("of another size",)]
    parallel = world(2)
    for name in ("auto", "one-shot"):
        chosen = choose(parallel, name)
        assert chosen == Reduction("one-shot to 128 tokens, nccl beyond", ("peers",))
    # Mapped once for all models of this size.
    assert joins.calls == [(parallel.group, 128, 3072, torch.bfloat16, GPU)]
    assert choose(parallel, hidden=64).peers == ("of another size",)


@pytest.mark.parametrize(
    ("size", "options", "why"),
    [
        (2, {"device": CPU}, "one-shot needs GPUs, this is cpu"),
        (2, {"ops": TORCH}, "one-shot needs backend mlra_kernels, this is torch"),
        (16, {}, "one-shot takes 8 ranks, these are 16"),
        (8, {"hidden": 60000}, "a token's message is too large for one-shot"),
        (2, {}, "rank 1: no peer access"),
    ],
)
def test_nccl_says_why(joins, size, options, why):
    joins.answers.append(one_shot.NoPeers("rank 1: no peer access"))
    parallel = world(size)
    assert choose(parallel, **options) == Reduction(f"nccl: {why}")
    with pytest.raises(ValueError, match=f"all-reduce one-shot cannot run: {why}; use auto or"):
        choose(parallel, "one-shot", **options)
    # A failure is not tried again.
    assert len(joins.calls) == (why == "rank 1: no peer access")


def test_nccl_can_be_asked_for(joins):
    assert choose(world(2), "nccl") == Reduction("nccl: asked for") and not joins.calls


def test_rows_are_fewer_on_more_ranks():
    assert [one_shot_rows(n, 3072, torch.bfloat16) for n in (2, 4, 8)] == [128, 42, 18]
    assert one_shot_rows(2, 64, torch.bfloat16) == 128


def test_large_messages_are_collectives(monkeypatch):
    """What the one-shot sum and the collective get, at and beyond the limit."""
    seen = []

    def fused(x, residual, weight, eps, peers):
        seen.append(("one-shot", len(x), peers.rows))
        return x, x

    class Ops:
        def add_rms_norm(self, x, residual, weight, eps):
            seen.append(("norm", len(x)))
            return x, x

    class Sums:
        def all_reduce(self, x):
            seen.append(("collective", len(x)))
            return x

    monkeypatch.setattr(one_shot, "all_reduce_add_rms_norm", fused)
    chosen, x = Reduction("", SimpleNamespace(rows=3)), torch.zeros(4, 8)
    for tokens in (1, 3, 4):
        chosen.add_rms_norm(Ops(), Sums(), x[:tokens], x[:tokens], x[0], 1e-6)
    assert seen == [("one-shot", 1, 3), ("one-shot", 3, 3), ("collective", 4), ("norm", 4)]
