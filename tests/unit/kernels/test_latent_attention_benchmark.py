"""Parts of the core's benchmark that need no GPU: documents, chunks, counts."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from mlra_kernels.benchmarks import latent_attention as benchmark
from mlra_kernels.benchmarks.core_peers import Core
from mlra_kernels.latent_attention import key_ranges


def test_workloads_cover_their_queries_and_count_what_is_scored():
    for sequences, keys, spans in benchmark.workloads(2048, 50, seed=1).values():
        assert sequences * spans[-1][1] == 2048
        first, last = key_ranges(spans)
        assert first.min() == 0 and last.max() < keys and (last >= first).all()
        assert benchmark.scored_pairs(spans) == int((last - first + 1).sum())


def test_documents_are_as_long_as_asked():
    spans = benchmark.document_spans(100_000, 500, seed=3)
    assert spans[0][0] == 0 and spans[-1][1] == 100_000
    assert 300 < 100_000 / len(spans) < 800


def test_ranks_of_a_sequence_score_as_much():
    plans = benchmark.workloads(2048, 50, seed=1)
    ranks = [plans[name][2] for name in plans if name.startswith("rank")]
    assert len(ranks) == 2 and len({benchmark.scored_pairs(spans) for spans in ranks}) == 1


def test_operations_of_a_step():
    """Of a causal sequence of n: n (n + 1) / 2 pairs, 2 operations a number of each product."""
    forward, backward = benchmark.flops([(0, 2048, 0, 2048)], 8)
    pairs = 96 * 8 * 2048 * 2049 // 2
    assert (forward, backward) == (2 * pairs * 320, 2 * pairs * 832)


def test_error_is_of_float32_attention():
    torch.manual_seed(0)
    spans = [(0, 3, 0, 3), (3, 8, 3, 8)]
    query, key = torch.randn(8, 1, 2, 192), torch.randn(8, 1, 1, 192)
    grad = torch.randn(8, 1, 2, 128)
    core = Core(query, key, grad, spans, reads={}, scale=benchmark.SCALE)
    first, last = key_ranges(spans)
    unread = (torch.arange(8) < first[:, None]) | (torch.arange(8) > last[:, None])
    q = query.clone().requires_grad_()
    x = torch.einsum("spe,te->pst", q[:, 0], key[:, 0, 0]) * core.scale
    weights = x.masked_fill(unread, -torch.inf).softmax(-1)
    out = torch.einsum("pst,te->spe", weights, key[:, 0, 0, :128])[:, None]
    (grad_query,) = torch.autograd.grad(out, q, grad)
    out = out.detach()
    assert benchmark.error(core, out, grad_query) < 1e-6
    assert benchmark.error(core, out, grad_query + 1) > 1e-2
    out[5, 0, 1] += 1
    assert benchmark.error(core, out, grad_query) > 1e-2
