"""Peers of the training core: the tensors they are called with, by stand-ins of torch on a CPU."""

import sys
from itertools import count, pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mlra_kernels.benchmarks import core_peers
from mlra_kernels.benchmarks import latent_attention as benchmark
from mlra_kernels.benchmarks.core_peers import Core
from mlra_kernels.benchmarks.providers import Provider

WIDTH, LATENT = 24, 16
WHOLE = [(0, 7, 0, 7)]
DOCUMENTS = [(0, 3, 0, 3), (3, 8, 3, 8), (8, 9, 8, 9)]


def core(spans, sequences=1):
    draw = torch.Generator().manual_seed(7)
    tokens = spans[-1][1]
    query, key, grad = (
        torch.randn(tokens, sequences, heads, width, generator=draw)
        for heads, width in ((6, WIDTH), (2, WIDTH), (6, LATENT))
    )
    return Core(query.requires_grad_(), key.requires_grad_(), grad, spans, {}, 0.3)


def attend(q, k, v, scale):
    """Causal attention `[s, t, h, e]`, with fewer key heads than query heads too."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    found = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, scale=scale, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )
    return found.transpose(1, 2)


def attend_packed(q, k, v, scale, starts):
    ends = starts.tolist()
    return torch.cat(
        [attend(*(x[None, a:b] for x in (q, k, v)), scale)[0] for a, b in pairwise(ends)]
    )


class FlashAttention4:
    """Refuses what the library's backward pass on Hopper refuses."""

    @staticmethod
    def check(q, k, v):
        if k.requires_grad and v.shape[-1] != k.shape[-1]:
            assert q.shape[-2] == k.shape[-2]

    def flash_attn_func(self, q, k, v, *, causal, softmax_scale):
        self.check(q, k, v)
        assert causal
        return attend(q, k, v, softmax_scale), None

    def flash_attn_varlen_func(self, q, k, v, *, causal, softmax_scale, **packed):
        self.check(q, k, v)
        starts = packed["cu_seqlens_q"]
        assert causal and starts.dtype == torch.int32 and starts.equal(packed["cu_seqlens_k"])
        assert packed["max_seqlen_q"] == packed["max_seqlen_k"] == starts.diff().max()
        return attend_packed(q, k, v, softmax_scale, starts), None


class DotProductAttention:
    def __init__(self, heads, channels, *, num_gqa_groups, softmax_scale, qkv_format, **more):
        assert (heads, channels, num_gqa_groups) == (6, (WIDTH, LATENT), 2)
        assert more["attention_dropout"] == 0.0
        self.scale, self.packed = softmax_scale, qkv_format == "thd"
        assert more["attn_mask_type"] == ("padding_causal" if self.packed else "causal")

    def __call__(self, q, k, v, mask, **more):
        assert mask is None
        if self.packed:
            return attend_packed(q, k, v, self.scale, more["cu_seqlens_q"]).flatten(-2)
        found = attend(*(x.transpose(0, 1) for x in (q, k, v)), self.scale)
        return found.transpose(0, 1).flatten(-2)


def sdpa_fwd(q, k, v, scale, is_causal):
    assert is_causal
    out = attend(*(x.transpose(1, 2) for x in (q, k, v)), scale).transpose(1, 2)
    return out, torch.zeros(())


def sdpa_bwd(grad, q, k, v, out, lse, scale, is_causal):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(sdpa_fwd(*leaves, scale, is_causal)[0], leaves, grad)


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    flash = FlashAttention4()
    for name, names in {
        "flash_attn": {}, "flash_attn.cute": {
            each: getattr(flash, each) for each in ("flash_attn_func", "flash_attn_varlen_func")
        },
        "transformer_engine": {},
        "transformer_engine.pytorch": {"DotProductAttention": DotProductAttention},
        "cudnn": {}, "cudnn.sdpa": {}, "cudnn.sdpa.fwd": {}, "cudnn.sdpa.fwd.torch_op": {},
    }.items():  # fmt: skip
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(
        torch.ops, "cudnn", SimpleNamespace(sdpa_fwd=sdpa_fwd, sdpa_bwd=sdpa_bwd), raising=False
    )
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.setenv(name, "")  # put back behind the test


@pytest.mark.parametrize("spans", [WHOLE, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("peer", [p for p in core_peers.PROVIDERS if p.name != "mlra_kernels"],
                         ids=lambda p: p.name)  # fmt: skip
def test_a_peer_computes_the_core(peer, spans):
    c = core(spans, 2 if spans == WHOLE else 1)
    if not peer.fits(c):
        assert peer.name == "cuDNN frontend" and spans == DOCUMENTS
        return
    passes = peer.build(c)
    assert passes.forward().shape == c.grad.shape
    assert benchmark.error(c, passes.forward(), passes.both()[0]) < 1e-5
    if passes.ahead:
        passes.ahead()


def test_peers_take_no_keys_of_other_chunks():
    for c in (core([(0, 3, 0, 3)]), core(DOCUMENTS)):
        assert core_peers.reads_itself(c)
    chunk = Core(*(torch.zeros(n, 1, 1, 1) for n in (3, 5, 3)), [(0, 3, 0, 5)], {}, 1.0)
    assert not core_peers.reads_itself(chunk)


def test_a_wrong_or_broken_peer_is_left_out_and_ours_is_not(monkeypatch, capsys):
    ticks = count(2000, 1000)
    monkeypatch.setattr(benchmark, "graph_microseconds", lambda calls, min_calls: next(ticks))
    monkeypatch.setattr(benchmark, "stream_microseconds", lambda call: next(ticks))
    right = next(p for p in core_peers.PROVIDERS if p.name == "FlashAttention-4").build

    def wrong(c):
        passes = right(c)
        return core_peers.Passes(lambda: passes.forward() * 1.1, passes.both)

    def broken(c):
        raise AssertionError("head dims\nare odd")

    def able(ours):
        ways = {"mlra_kernels": ours, "wrong": wrong, "broken": broken, "right": right}
        return [Provider(name, lambda c: True, way) for name, way in ways.items()]

    records = benchmark.measure("w", core(DOCUMENTS), able(right))
    assert [r["provider"] for r in records] == ["mlra_kernels", "right"]
    lines = capsys.readouterr().out
    assert "wrong" in lines and "broken" in lines and "head dims are odd" in lines
    assert benchmark.table(records).splitlines()[-1].startswith("| w | 2.00 / ")
    with pytest.raises(SystemExit, match="RED"):
        benchmark.measure("w", core(DOCUMENTS), able(wrong))
    with pytest.raises(AssertionError, match="odd"):
        benchmark.measure("w", core(DOCUMENTS), able(broken))


def test_a_package_that_cannot_be_imported_is_said(monkeypatch, tmp_path):
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("raise OSError('libx.so')")
    monkeypatch.syspath_prepend(tmp_path)
    said = core_peers.without("broken_package.inner", "pip install it")()
    assert said == "broken_package.inner cannot be imported (OSError: libx.so); pip install it"
    said = core_peers.without("no_such.inner", "pip install it")()
    assert said == "no_such.inner is not installed; pip install it"
