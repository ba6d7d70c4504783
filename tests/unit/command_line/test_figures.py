"""One table of colours, plain numbers on axes, figures of one size."""

from __future__ import annotations

import struct

import pytest

import figures as evidence
from megatron_mlra.command_line import figures
from mlra_kernels.benchmarks import latent_decode
from support import ROOT

DRAWN = sorted(path for folder in ("docs", "kernels") for path in (ROOT / folder).rglob("*.png"))


def test_each_kind_of_attention_has_a_colour_of_its_own():
    taken = list(figures.COLOURS.values())
    assert len(set(taken)) == len(taken)
    assert set(evidence.COLORS.values()) <= set(taken)
    assert latent_decode.COLOURS.items() <= figures.COLOURS.items()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("MLRA-4", "MLRA-4"),
        ("MLRA-4 FP8 1/4", "MLRA-4"),
        ("MLRA-4 gated", "MLRA-4 gated"),
        ("MLRA-4/TP4 q=2", "MLRA-4"),
        ("MLA, tokens cut (DCP)", "MLA"),
        ("MLA (Megatron's)", "MLA"),
        ("stock-mla", "MLA"),
        ("stock-mla-fused", "MLA"),
        ("GQA-8 whole", "GQA"),
        ("GQA, 8 KV heads", "GQA"),
        ("GLA-2/TP2", "GLA-2"),
        ("MLAX", None),
        ("bf16", None),
    ],
)
def test_a_name_has_the_colour_of_its_kind(name, kind):
    assert figures.colour(name) == (figures.COLOURS[kind] if kind else None)


def test_other_names_get_colours_apart():
    found = figures.colours(["bf16", "MLA", "blockwise", "delayed"])
    assert found["MLA"] == figures.COLOURS["MLA"] and len(set(found.values())) == 4


@pytest.mark.parametrize(
    ("count", "said"),
    [(512, "512"), (2048, "2K"), (131072, "128K"), (2**20, "1M"), (3 * 2**19, "1.5M")],
)
def test_numbers_of_tokens_are_round(count, said):
    assert figures.tokens(count) == said


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.name)
def test_committed_figures_have_one_size(path):
    head = path.read_bytes()[:24]
    assert head[1:4] == b"PNG" and struct.unpack(">II", head[16:24]) == (1200, 700)
