"""Which differences of RoPE a command line asks for, and which only look like it."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_mlra.fault_tolerance.rope_change import changes

YARN = {"rope_type": "yarn", "rotary_scaling_factor": 4.0}
YARN |= {"original_max_position_embeddings": 2048}


def args(**values) -> Namespace:
    return Namespace(**{"rotary_base": 10000, "seq_length": 2048} | values)


@pytest.mark.parametrize(
    ("saved", "here", "given", "asked", "unasked"),
    [
        ({}, {}, "--rotary-base", [], []),
        ({"rope_type": None}, {"rope_type": "rope"}, "", [], []),
        # Without YaRN its numbers are no part of the function.
        ({"mscale": 1.0}, {"mscale": 0.7, "rotary_scaling_factor": 8}, "", [], []),
        ({}, {"rotary_base": 500000}, "--rotary-base", ["rotary base 10000 -> 500000"], []),
        (
            {},
            {"rotary_base": 500000},
            "",
            [],
            [
                "rotary_base is 10000 there, 500000 here (--rotary-base 10000 goes on with it,"
                " --rotary-base 500000 changes it)"
            ],
        ),
        (
            YARN,
            {},
            "",
            [],
            [
                "rope_type is yarn there, rope here (--rope-type yarn goes on with it,"
                " --rope-type rope changes it)"
            ],
        ),
        (YARN, {}, "--rope-type", ["rope type yarn -> rope"], []),
        (
            YARN,
            YARN | {"rotary_scaling_factor": 8.0},
            "--rotary-scaling-factor",
            ["rotary scaling factor 4 -> 8"],
            [],
        ),
        (
            YARN,
            YARN | {"mscale": 0.707},
            "--rope-type",
            [],
            [
                "mscale is 1 there, 0.707 here (--mscale 1 goes on with it, --mscale 0.707 changes"
                " it)"
            ],
        ),
        ({}, {"seq_length": 8192}, "--seq-length", ["sequence length 2,048 -> 8,192"], []),
        ({}, {"seq_length": 8192}, "", ["sequence length 2,048 -> 8,192 by the preset"], []),
    ],
)
def test_a_change_counts_where_its_flag_stands(saved, here, given, asked, unasked):
    found_asked, found_unasked = changes(args(**saved), args(**here), {given})
    assert found_asked == asked
    assert found_unasked[: len(unasked)] == unasked and bool(found_unasked) == bool(unasked)
