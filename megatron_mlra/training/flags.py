"""This project's flags of the training entry, their help, and the answers that need no Megatron.

This module does not import torch, so `--help`, `--version` and `--config list` answer at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from megatron_mlra.command_line.parser import HelpFormatter, OneLineParser, Version
from megatron_mlra.description.backends import (
    CORE_BACKENDS,
    CORE_FORMS,
    FP8_LINEARS,
    LATENT_KERNELS,
    TP_LAYOUTS,
    current_name,
)
from megatron_mlra.description.model import ATTENTIONS
from megatron_mlra.description.presets import preset_list
from megatron_mlra.planner.gpus import GPUS

LIST = "list"
"""The value of `--config` that prints the presets."""

ABOUT = "Train MLA, GLA, MLRA and their baselines on Megatron-core, or resume a run."

EPILOG = """\
example: mlra pretrain --config debug --data-path data/my --save runs/my

Megatron's flags work beside these, or are refused in one line; --help-megatron
lists them. Often:
--data-path, --mock-data, --split, --save, --load, --save-interval, --lr,
--train-iters, --train-samples, --global-batch-size, --micro-batch-size,
--seq-length, --tensor-model-parallel-size, --sequence-parallel,
--pipeline-model-parallel-size, --context-parallel-size, --eval-interval.
A preset sets defaults, the command line wins, and every switch has an opposite
(--bf16, --no-bf16)."""


def add_mlra_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this project's flags to Megatron's parser, or to a parser of their own; returns it."""
    _add_preset(parser.add_argument_group("preset and help"))
    _add_attention(parser.add_argument_group("attention"))
    _add_layout(parser.add_argument_group("layout, cores and kernels"))
    _add_data(parser.add_argument_group("data and validation"))
    _add_run(parser.add_argument_group("the run"))
    return parser


def _add_preset(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--config",
        metavar="PRESET",
        help="a preset by name or path: its values are the defaults of all flags; list: print the"
        " presets",
    )
    add("--help-megatron", action="help", help="print every flag, Megatron's too, and exit")
    add("--version", action=Version, help="print the versions and exit")


def _add_attention(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--attention",
        choices=ATTENTIONS,
        default="mlra",
        help="mlra: MLA, GLA-n, MLRA-n by --num-latent-heads and --num-branches; gqa: Megatron's"
        " own (MHA, GQA, MQA); gta, mfa, tpa: the paper's other baselines (default: mlra)",
    )
    add("--num-latent-heads", type=int, default=4, metavar="L", help="latent heads (default: 4)")
    add(
        "--num-branches",
        type=int,
        default=4,
        metavar="N",
        help="branches that a head sums over (default: 4)",
    )
    add(
        "--qk-nope-head-dim",
        type=int,
        dest="qk_head_dim",
        metavar="DIM",
        help="size of a head's part without position; Megatron's --qk-head-dim",
    )
    add(
        "--qk-rope-head-dim",
        type=int,
        dest="qk_pos_emb_head_dim",
        metavar="DIM",
        help="size of its rotated part, 0 for none (NoPE); Megatron's --qk-pos-emb-head-dim",
    )
    add("--tpa-q-rank", type=int, default=6, metavar="R", help="rank of TPA's queries (default: 6)")
    add(
        "--tpa-kv-rank",
        type=int,
        default=2,
        metavar="R",
        help="rank of TPA's keys and values (default: 2)",
    )
    add(
        "--query-head-norm",
        action="store_true",
        help="RMSNorm of every query head before RoPE (mlra); of gqa --qk-layernorm norms queries"
        " and keys",
    )
    add(
        "--output-gate", action="store_true", help="multiply the attention output by a learned gate"
    )
    add(
        "--no-variance-scaling",
        action="store_false",
        dest="variance_scaling",
        default=True,
        help="leave out the scales that keep queries and latents at unit variance",
    )
    add(
        "--no-zero-init-output",
        action="store_false",
        dest="zero_init_output",
        default=True,
        help="start the output projections at random, not at zero",
    )


def _add_layout(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--latent-tp-layout",
        choices=TP_LAYOUTS,
        default="head",
        help="what a tensor-parallel rank owns: whole heads, or latents (default: head)",
    )
    add(
        "--core-form",
        choices=CORE_FORMS,
        default="auto",
        help="attend to latents, or to keys and values made of them (auto: the faster one)",
    )
    add(
        "--core-backend",
        type=partial(current_name, "core_backend"),
        choices=CORE_BACKENDS,
        default="auto",
        help="the core by torch, Transformer Engine or this project's kernels of the absorbed form"
        " (auto: the last on Hopper GPUs with TE layers)",
    )
    add(
        "--latent-kernels",
        type=partial(current_name, "latent_kernels"),
        choices=LATENT_KERNELS,
        default="auto",
        help="the passes around the core by torch or by this project's kernels (auto: with TE"
        " layers)",
    )
    add(
        "--fp8-linears",
        choices=FP8_LINEARS,
        default="wide",
        help="which linears --fp8-format applies to: all, or those that gain (wide: MLP, output and"
        " gate projections)",
    )
    add(
        "--no-recompute-absorbed-query",
        action="store_false",
        dest="recompute_absorbed_query",
        default=True,
        help="keep the absorbed core's queries for backward: more memory, no rebuilding",
    )


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--packed-sequences",
        action="store_true",
        dest="dataloader_inter_document_masking",
        help="documents of a sequence attend to themselves alone, their positions start anew;"
        " Megatron's --dataloader-inter-document-masking",
    )
    add(
        "--data-seed",
        type=int,
        metavar="SEED",
        help="draws the order of the data; default: --seed, which also draws the initial weights",
    )
    add(
        "--held-out",
        nargs="+",
        metavar="NAME=PREFIX",
        help="datasets to score whole and in order behind the last step (held_out.json in --save)",
    )
    add(
        "--eval-at-start",
        action="store_true",
        help="print the validation loss before the first step too",
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--dry-run",
        type=int,
        metavar="GPUS",
        help="check the arguments for a launch on this many GPUs, print the plan, who owns what and"
        " the command, and exit; needs no GPU",
    )
    add(
        "--dry-run-gpu",
        choices=GPUS,
        default="h100",
        metavar="GPU",
        help=f"the GPU that --dry-run plans with: {', '.join(GPUS)} (default: h100)",
    )
    add(
        "--keep-last",
        type=int,
        metavar="K",
        help="keep the newest K checkpoints of --save and delete older ones (default: keep all)",
    )
    add(
        "--hang-timeout-seconds",
        type=float,
        metavar="SECONDS",
        help="end the job, naming the rank, when one has not answered or has kept the others"
        " waiting for this long (0: never; default: 0.8 of --distributed-timeout-minutes)",
    )
    add(
        "--verbose-optimizer",
        action="store_true",
        help="print which optimizer takes which weights, and as which matrices",
    )
    add(
        "--verbose-megatron",
        action="store_true",
        help="print everything Megatron prints, not only this project's summary and progress",
    )


def parser() -> OneLineParser:
    """A parser of this project's flags alone, which are what `--help` shows."""
    own = OneLineParser(
        usage="%(prog)s [--config PRESET] [flags of this page or of Megatron ...]",
        description=ABOUT,
        epilog=EPILOG,
        add_version=False,
    )
    return add_mlra_arguments(own)


def answer(argv: list[str]) -> bool:
    """Answer `--help`, `--version` and `--config list`; returns whether `argv` asks for one."""
    found = None
    if {"-h", "--help"} & set(argv):
        found = parser().format_help().rstrip()
    elif "--version" in argv:
        found = Version.text()
    elif "--help-megatron" not in argv and wants_list(argv):
        found = preset_list()
    # In a launch of several ranks, rank 0 alone prints.
    if found is not None and os.environ.get("RANK", "0") == "0":
        print(found)
    return found is not None


def wants_list(argv: list[str]) -> bool:
    """Whether a command line asks for the presets."""

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    try:
        return preset_of(argv, refuse) == LIST
    except ValueError:
        return False  # the parser of all flags reports the error


def preset_of(argv: list[str], refuse: Callable[[str], NoReturn]) -> str | None:
    """The `--config` of a command line, read before all other flags; None without one."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.error = refuse
    finder.add_argument("--config")
    return finder.parse_known_args(argv)[0].config


def repair_help(parser: argparse.ArgumentParser) -> None:
    """Repair what `--help-megatron` prints.

    Megatron's help texts hold plain `%` signs, which argparse would read as formats. The usage line
    would list a thousand flags.
    """
    parser.formatter_class = HelpFormatter
    parser.usage = "%(prog)s [flags ...]"
