"""Packed sequences against separate ones: output and every gradient; and how plans cut tokens."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from megatron_mlra.layers.core_attention import LatentCoreAttention, SDPACoreAttention
from megatron_mlra.sharding.token_plan import PackedDocuments, plan_tokens
from mlra_kernels.latent_attention import key_ranges
from mlra_kernels.latent_attention.reference import latent_attention_reference
from support.modules import FORMS, MLRA2, VARIANTS, build, named, run
from support.oracle import reference, relative_error

BOUNDS = (0, 1, 6, 9, 16)
CPU = torch.device("cpu")
# Packed and separate kernels add in another order, in float32.
TOLERANCE = 1e-5


def packing(*bounds: int, padded: tuple[int, ...] | None = None, **fields) -> PackedSeqParams:
    lengths = torch.tensor(bounds, dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=lengths,
        cu_seqlens_kv=lengths,
        cu_seqlens_q_padded=None if padded is None else torch.tensor(padded, dtype=torch.int32),
        **fields,
    )


def run_packed(attention, x, upstream, packed) -> dict[str, torch.Tensor]:
    x = x.float().requires_grad_()
    output, _ = attention(x, None, packed_seq_params=packed)
    (output * upstream.float()).sum().backward()
    grads = {name: p.grad for name, p in named(attention).items()}
    return {"output": output.detach(), "x": x.grad} | grads


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ["MLA", "GLA-2", "MLRA-2", "MLRA-4"])
@pytest.mark.parametrize("recompute", [[], ["core_attn"], ["mla_up_proj"]])
def test_packed_equals_separate(groups, variant, form, recompute):
    case = VARIANTS[variant]
    expected = reference(case, BOUNDS[-1], 1)
    options = {"core_form": form}
    if recompute:
        options |= {"recompute_granularity": "selective", "recompute_modules": recompute}
    attention = build(case, groups, expected.parameters, **options)
    packed = run_packed(attention, expected.x, expected.upstream, packing(*BOUNDS))
    attention.zero_grad()
    parts = []
    for start, stop in pairwise(BOUNDS):
        attention.zero_grad()
        alone = run(attention, expected.x[start:stop], expected.upstream[start:stop])
        parts.append({name: value.clone() for name, value in alone.items()})
    for name, value in packed.items():
        pieces = [part[name] for part in parts]
        separate = torch.cat(pieces) if name in ("output", "x") else sum(pieces)
        assert relative_error(value, separate) <= TOLERANCE, name


def test_padding_is_attended_to_by_no_token(groups):
    expected = reference(MLRA2, 8, 1)
    attention = build(MLRA2, groups, expected.parameters)
    lengths = packing(0, 3, 6, padded=(0, 4, 8))
    real = torch.tensor([0, 1, 2, 4, 5, 6])
    upstream = torch.zeros_like(expected.upstream)
    upstream[real] = expected.upstream[real]
    padded = run_packed(attention, expected.x, upstream, lengths)
    attention.zero_grad()
    tight = run_packed(attention, expected.x[real], upstream[real], packing(0, 3, 6))
    for name, value in padded.items():
        value = value[real] if name in ("output", "x") else value
        assert relative_error(value, tight[name]) <= TOLERANCE, name


@pytest.mark.parametrize(
    ("cp", "bounds", "cut_documents"),
    [
        (1, None, False),
        (1, (0, 5, 5, 16), False),
        (2, None, False),
        (4, None, False),
        (2, (0, 5, 6, 16), False),
        (4, (0, 1, 15, 16), False),
        (2, (0, 4, 16), "padded"),
        (4, (0, 8, 16), "padded"),
        (2, (0, 1, 2, 9, 16), "own"),
        (4, (0, 3, 4, 15, 16), "own"),
        (4, (0, 8, 16), "own"),
        (4, (0, 2, 4, 6, 8, 10, 12, 14, 16), "own"),
        (8, tuple(range(17)), "own"),
    ],
)
def test_every_token_attends_to_its_documents_past(cp, bounds, cut_documents):
    tokens = 16
    ends = bounds or (0, tokens)
    document = torch.searchsorted(torch.tensor(ends[1:]), torch.arange(tokens), right=True)
    first = torch.tensor([0, *ends[1:]])[document]
    packed = None
    if bounds is not None:
        packed = packing(*bounds, padded=bounds if cut_documents == "padded" else None)
    if cut_documents == "own":
        packed = PackedDocuments(qkv_format="thd", bounds=bounds)
    plans = [plan_tokens(tokens // cp, cp, rank, packed, CPU) for rank in range(cp)]
    seen, work = [], []
    for plan in plans:
        own = []
        for a, b, start, stop in plan.spans:
            assert a == len(own)
            mine = torch.arange(stop - (b - a), stop)
            # The last query is the last key; all keys are of its document, from its first on.
            assert (first[mine] == start).all()
            own += mine.tolist()
        assert len(own) == tokens // cp
        assert plan.cut(torch.arange(tokens)[None], dim=1).tolist() == [own]
        place = torch.tensor(own) - first[own]
        if plan.positions is not None:
            assert plan.positions.equal(place)
            assert plan.key_positions.equal(torch.arange(tokens) - first)
            ranges = key_ranges(plan.spans)
            assert ranges.tolist() == [first[own].tolist(), own]
            assert (ranges.diff() >= 0).all(), "neither end falls"
        seen += own
        work.append(int((place + 1).sum()))
    assert sorted(seen) == list(range(tokens))
    for plan in plans:
        assert plan.in_sequence_order(torch.tensor(seen)).tolist() == list(range(tokens))
    if bounds is None or cut_documents == "padded":
        assert len(set(work)) == 1, "zig-zag ranks have the same work"


def test_documents_of_any_length_are_balanced():
    """No rank has more than two tokens of a document more than another."""
    bounds = (0, 7, 40, 41, 300, 512)
    packed = PackedDocuments(qkv_format="thd", bounds=bounds)
    work = []
    for rank in range(4):
        spans = plan_tokens(128, 4, rank, packed, CPU).spans
        assert len(spans) <= 2 * 5
        pairs = [(b - a) * (end - first - (b - a - 1) / 2) for a, b, first, end in spans]
        work.append(sum(pairs))
    assert max(work) - min(work) <= 2 * bounds[-1]


def test_divisible_documents_are_cut_as_megatron_cuts_them():
    packed = packing(0, 8, 24, padded=(0, 8, 24))
    known = PackedDocuments(qkv_format="thd", bounds=(0, 8, 24))
    assert plan_tokens(12, 2, 1, known, CPU) is plan_tokens(12, 2, 1, packed, CPU)
    assert plan_tokens(12, 2, 1, known, CPU).own_chunks == ((2, 4), (4, 6), (12, 16), (16, 20))


def test_variable_lengths_lay_the_keys_of_spans_one_behind_the_other():
    plan = plan_tokens(8, 2, 0, packing(0, 5, 16), CPU)
    varlen = plan.varlen
    assert varlen.cu_seqlens_q.tolist() == [0, 4, 8]
    assert varlen.cu_seqlens_kv.tolist() == [0, 4, 15]
    assert (varlen.max_seqlen_q, varlen.max_seqlen_kv) == (4, 11)
    assert varlen.key_index.tolist() == [*range(4), *range(5, 16)]
    assert plan_tokens(16, 1, 0, packing(0, 5, 16), CPU).varlen.key_index is None


@pytest.mark.parametrize(
    ("cp", "bounds", "way"),
    [
        (1, (0, 250, 500, 750, 1024), "tiles"),
        (2, (0, 250, 500, 750, 1000), "tiles"),
        (1, (0, *range(2, 1024, 5), 1024), "ranges"),
        (2, None, "ranges"),
    ],
)
def test_the_latent_core_reads_what_a_plan_says(cp, bounds, way, monkeypatch):
    """Its kernels' reference in their place, against torch's core; largest logits too."""

    def with_top(query, key, latent_dim, scale, **reads):
        assert list(reads) == [way]
        return latent_attention_reference(query, key, latent_dim, scale, **reads)[0], None

    def alone(*arguments, **reads):
        return with_top(*arguments, **reads)[0]

    monkeypatch.setattr("mlra_kernels.latent_attention.latent_attention", alone)
    monkeypatch.setattr("mlra_kernels.latent_attention.latent_attention_with_top", with_top)
    config = SimpleNamespace(attention_dropout=0.0, sequence_parallel=False)
    latent, torchs = (
        kind(config, 1, AttnMaskType.causal, "self", 0.3)
        for kind in (LatentCoreAttention, SDPACoreAttention)
    )
    generator, tokens = torch.Generator().manual_seed(1), bounds[-1] if bounds else 1024
    key = torch.randn(tokens, 1, 2, 12, generator=generator)
    for rank in range(cp):
        plan = plan_tokens(tokens // cp, cp, rank, bounds and packing(*bounds), CPU)
        query = torch.randn(tokens // cp, 1, 4, 12, generator=generator)
        expected = torchs(query, key, key[..., :8], None, plan=plan)
        for wanted in (False, True):
            latent.largest = SimpleNamespace(wanted_of=lambda _, w=wanted: w, add=lambda _: None)
            found = latent(query, key, key[..., :8], plan=plan)
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
        assert plan.latent_reads is plan.latent_reads, "made once a plan"


@pytest.mark.parametrize(
    ("local", "cp", "packed", "error"),
    [
        (7, 2, None, "a sequence of 14 tokens does not divide into 4 chunks .* multiple of 4"),
        (8, 2, packing(0, 5, 16, padded=(0, 6, 16)), "a packed document of 6 tokens does not"),
        (16, 1, packing(0, 5, 15), r"cu_seqlens 0, 5, 15 do not cover the 16 tokens"),
        (16, 1, packing(0, 9, 5, 16), "cu_seqlens 0, 9, 5, 16 do not cover the 16 tokens"),
        (4, 1, PackedSeqParams(qkv_format="sbhd"), "qkv_format 'sbhd'; use 'thd'"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(local, cp, packed, error):
    with pytest.raises(ValueError, match=error):
        plan_tokens(local, cp, 0, packed, CPU)


def test_packed_rows_and_masks_are_refused(groups):
    expected = reference(MLRA2, 8, 2)
    attention = build(MLRA2, groups, expected.parameters)
    with pytest.raises(ValueError, match="packed sequences come in one row of tokens, not 2"):
        attention(expected.x.float(), None, packed_seq_params=packing(0, 8))
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="leave the mask out"):
        attention(expected.x[:, :1].float(), mask, packed_seq_params=packing(0, 8))
