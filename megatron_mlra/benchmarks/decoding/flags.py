"""The flags of `mlra benchmark-decoding`, and what it measures."""

from __future__ import annotations

import argparse

from megatron_mlra.checkpoint.files.tracker import a_checkpoint
from megatron_mlra.command_line.early import a_file, reads, writes
from megatron_mlra.command_line.numbers import real, whole
from megatron_mlra.command_line.parser import OneLineParser
from megatron_mlra.command_line.results import check_figure, check_json
from megatron_mlra.data.prefixes import check_files
from megatron_mlra.description.backends import ALL_REDUCES, PRODUCTS
from megatron_mlra.description.presets import a_preset

ABOUT = (
    "Measure time per output token: MLRA against MLA and GQA, on one GPU or, under torchrun, on"
    " all. Random weights and a cache filled with random numbers: times do not depend on their"
    " values. On one GPU a model is measured whole and as one rank's share, the work of one of N"
    " ranks without its collectives. Under torchrun it is cut over all processes, collectives"
    " included."
)
TPS = [4, 1]
PRESETS = ("mlra4_2.9b", "mla_2.9b", "gqa_2.9b")


def parser() -> OneLineParser:
    """The flags."""
    flags = OneLineParser(description=ABOUT)
    add = flags.add_argument
    configs = add(
        "--configs",
        nargs="+",
        default=list(PRESETS),
        metavar="PRESET",
        help=f"presets by name or path (default: {' '.join(PRESETS)})",
    )
    reads(configs, a_preset)
    add(
        "--tp",
        type=whole(1),
        nargs="+",
        default=TPS,
        help="shares to measure on one GPU (default: 4 1); under torchrun the processes decide",
    )
    add(
        "--context-parallel",
        type=whole(1),
        nargs="+",
        default=[1],
        metavar="N",
        help="measure with the tokens of each sequence cut over N ranks too: of the processes under"
        " torchrun, else besides --tp (default: 1)",
    )
    add(
        "--all-reduce",
        nargs="+",
        choices=ALL_REDUCES,
        default=["auto"],
        metavar="HOW",
        help=f"how processes sum, each measured: {', '.join(ALL_REDUCES)} (default: auto, the rule"
        " of `mlra generate`)",
    )
    add(
        "--rehearse",
        action="store_true",
        help="run every case at a tiny size on CPUs, by gloo under torchrun, and time nothing",
    )
    add(
        "--contexts",
        type=whole(1),
        nargs="+",
        metavar="TOKENS",
        help="tokens in the cache (default: 4, 32, 128 and 512 K; 1 K with --speculate)",
    )
    add(
        "--batches",
        type=whole(1),
        nargs="+",
        default=[1, 32],
        help="sequences that are decoded together (default: 1 32)",
    )
    add(
        "--products",
        choices=PRODUCTS,
        default="auto",
        help="products of few rows: the project's kernels, each started before the one in front has"
        " ended (auto, the default), or after it (serial), or cuBLAS",
    )
    add(
        "--profile",
        action="store_true",
        help="also trace ten replays of every step that is timed: microseconds of each kernel",
    )
    add("--prefill", type=whole(1), nargs="*", default=[], help="lengths of prompts to time too")
    add(
        "--prefill-chunk",
        type=whole(1),
        default=4096,
        help="tokens of a prefill step (default: 4096)",
    )
    speculate = add(
        "--speculate",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="serve prompts without and with guesses of multi-token prediction, by the layer of a"
        " checkpoint (on a CPU too), or of --configs with random weights",
    )
    reads(speculate, lambda value, flag: value and a_checkpoint(value, flag))
    text = add(
        "--text", metavar="FILE", help="text of the prompts of --speculate; default: a sample"
    )
    reads(text, a_file)
    data = add(
        "--data", metavar="PREFIX", help="a dataset that those prompts are pieces of instead"
    )
    reads(data, check_files)
    add(
        "--new-tokens",
        type=whole(1),
        default=128,
        help="tokens behind each prompt of --speculate (default: 128)",
    )
    add(
        "--temperature",
        type=real(0),
        nargs="+",
        default=[0.0],
        help="of the draws of --speculate, one run each; default 0: the likeliest",
    )
    writes(add("--json", metavar="FILE", help="where to write the records"), check_json)
    writes(add("--png", metavar="FILE", help="where to draw time over context"), check_figure)
    add("--commit", help="commit to name in the report")
    add("--seed", type=whole(0, 2**31 - 1), help="of weights and cache; default: the clock")
    flags.together.append(check)
    return flags


def check(args: argparse.Namespace) -> None:
    """Check the flags against each other.

    Raises:
        ValueError: a flag that the run would not heed; names the flag and the fix.
    """
    guesses = args.speculate is not None
    if args.profile and (args.rehearse or guesses):
        other = "--rehearse" if args.rehearse else "--speculate"
        raise ValueError(
            f"--profile traces steps that are replayed and timed alone, and {other} has none;"
            " leave one of them out"
        )
    for name in ("text", "data"):
        if getattr(args, name) and not args.speculate:
            raise ValueError(f"--{name} is for --speculate FOLDER; add it, or leave --{name} out")
    if args.data and args.text:
        raise ValueError("--data is for --speculate FOLDER, in place of --text; leave one out")
    if not guesses:
        return
    if args.context_parallel != [1]:
        raise ValueError("--speculate needs whole sequences; leave --context-parallel out")
    for flag, given in (
        ("--tp", args.tp != TPS), ("--prefill", args.prefill), ("--png", args.png),
        ("--all-reduce", args.all_reduce != ["auto"]),
    ):  # fmt: skip
        if given:
            raise ValueError(f"{flag} is not for --speculate; leave one of them out")
