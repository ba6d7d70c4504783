"""Flags of Megatron that nothing reads are refused, and the lists of them are those of its code."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import megatron.core
import megatron.training
import pytest

import megatron_mlra
from megatron_mlra.training import all_flags, early_checks, value_checks
from megatron_mlra.training.unread_flags import UNREAD

NAMES = [name for names in UNREAD.values() for name in names]
TAKEN = {
    # What they ask for happens anyway.
    "use_flash_attn",
    "deprecated_use_mcore_models",
    # Read by Megatron's checks of arguments, which set others or refuse them.
    "no_weight_decay_cond_type",
    "recompute_activations",
    "checkpoint_activations",
    "use_dist_ckpt_deprecated",
    "dist_ckpt_format_deprecated",
    "ckpt_fully_parallel_save_deprecated",
    "grad_reduce_in_bf16",
    "cuda_graph_scope_deprecated",
    "disable_msc_deprecated",
    # Read by the name that Megatron puts together of `muon_` and the rest.
    "muon_nesterov",
    "muon_fp32_matmul_prec",
}
"""Destinations whose names stand nowhere as an attribute or a text, and which are taken."""


@functools.cache
def read() -> set[str]:
    """Names of attributes, and texts, in the code that a run may execute."""
    found: set[str] = set()
    for package in (megatron.core, megatron.training, megatron_mlra):
        folder = Path(package.__path__[0])
        for file in folder.rglob("*.py"):
            if file == folder / "arguments.py" or file.name == "unread_flags.py":
                continue
            if {"rl", "legacy"} & {*file.relative_to(folder).parts}:
                continue
            text = file.read_text(errors="replace")
            found.update(re.findall(r"\.(\w+)", text))
            found.update(re.findall(r"['\"](\w+)['\"]", text))
    return found


def destinations() -> dict[str, str]:
    """Destination -> a flag of Megatron's parser."""
    lines = [line.split() for line in all_flags.FLAGS.read_text().splitlines()]
    return {words[1]: words[0].partition(",")[0] for words in lines}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_reads_a_flag_that_is_refused(name):
    assert name not in read()


def test_every_other_flag_is_read():
    unread = {*destinations()} - read() - {*NAMES} - {*value_checks.REPLACED}
    assert unread == TAKEN


@pytest.mark.parametrize(
    "words",
    [
        ["--check-for-spiky-loss"],
        ["--per-dataset-sequences-path", "x.json"],
        ["--rl-partial-rollouts"],
        ["--mask-prob", "0.15"],
        ["--inference-max-requests", "8"],
    ],
    ids=lambda words: words[0],
)
def test_refusals(words):
    with pytest.raises(ValueError, match="leave it out") as raised:
        early_checks.parsed(["--config", "debug", *words])
    assert str(raised.value).startswith(words[0])
    assert "\n" not in str(raised.value)


def test_old_launch_scripts_are_taken():
    words = ["--use-flash-attn", "--use-mcore-models", "--no-rl-partial-rollouts"]
    early_checks.parsed(["--config", "debug", *words])
