"""Command line of `mlra plan`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

from megatron_mlra.command_line.early import reads, writes
from megatron_mlra.command_line.numbers import whole
from megatron_mlra.command_line.parser import (
    OneLineParser,
    flag,
    one_line,
)
from megatron_mlra.command_line.results import check_figure
from megatron_mlra.command_line.suggest import is_elsewhere, refusal
from megatron_mlra.description.backends import TP_LAYOUTS
from megatron_mlra.description.megatron_args import from_megatron_args
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.presets import KEYS, a_preset, preset_name, preset_values
from megatron_mlra.planner.command import NODE, fp8_sizes, launch_command, left_over
from megatron_mlra.planner.gpus import GPUS, Assumptions, find
from megatron_mlra.planner.layout import Layout
from megatron_mlra.planner.report import Report, build
from megatron_mlra.planner.tables import print_report

MOST_GPUS = 10**6
"""Most GPUs of a run that is planned: all ways to cut a larger number take minutes."""
CONTEXTS = (8192, 131072, 1048576)


def parser() -> OneLineParser:
    """The flags, including one per field of Assumptions."""
    flags = OneLineParser(
        description="Memory, time, traffic and layouts of a run before it is launched.",
        epilog="example: mlra plan --config mlra4_7b --gpus 64 --gpu h100",
        allow_abbrev=False,
    )
    flags.error = lambda message: _refuse(
        of_a_run(message, flags._option_string_actions)
        or refusal(message, flags._option_string_actions)
    )
    config = flags.add_argument("--config", required=True, help="a preset by name or path")
    reads(config, a_preset)
    flags.add_argument(
        "--gpus", type=whole(1, MOST_GPUS), required=True, help="GPUs of the training run"
    )
    flags.add_argument(
        "--gpu", default="h100", help=f"kind of GPU: {', '.join(GPUS)} (default: h100)"
    )
    flags.add_argument(
        "--seq-length", type=whole(1), help="tokens of a sequence; default: the preset's"
    )
    flags.add_argument(
        "--global-batch-size", type=whole(1), help="sequences of a step; default: the preset's"
    )
    flags.add_argument(
        "--tp-layout",
        choices=TP_LAYOUTS,
        default="head",
        help="what a tensor-parallel rank owns: whole heads, or latents (default: head)",
    )
    flags.add_argument(
        "--cp", type=whole(1), help="context-parallel size; default: tried where sequences are long"
    )
    flags.add_argument(
        "--fp8", action="store_true", help="plan with the layers' matrix products in FP8"
    )
    flags.add_argument(
        "--gpus-per-node",
        type=whole(1),
        default=NODE,
        help=f"most GPUs of a node (default: {NODE})",
    )
    flags.add_argument(
        "--top", type=whole(1), default=5, help="number of layouts to print (default: 5)"
    )
    flags.add_argument(
        "--decode-gpus",
        type=whole(1),
        default=8,
        help="GPUs of one decoding replica (default: 8)",
    )
    flags.add_argument(
        "--decode-batch", type=whole(1), default=1, help="sequences that it decodes (default: 1)"
    )
    flags.add_argument(
        "--contexts",
        type=whole(1),
        nargs="+",
        metavar="TOKENS",
        default=list(CONTEXTS),
        help=f"lengths of a decoded sequence (default: {' '.join(map(str, CONTEXTS))})",
    )
    flags.add_argument(
        "--details",
        action="store_true",
        help="also print memory by part, traffic, layouts that do not fit, decoding, assumptions",
    )
    flags.add_argument("--json", action="store_true", help="print JSON, all of it, and no tables")
    plot = flags.add_argument("--plot", metavar="FILE.png", help="draw memory, time and decoding")
    writes(plot, check_figure)
    assumed = flags.add_argument_group("assumptions (shares of stated rates)")
    for field in fields(Assumptions):
        about = f"{field.metadata['help']} (default: {field.default:g})"
        assumed.add_argument(
            flag(field.name), type=float, metavar="X", default=field.default, help=about
        )
    return flags


def main(argv: list[str] | None = None) -> int:
    """Print the plan; returns the exit code (0; 1: no layout fits; 2: bad input)."""
    try:
        args = parser().parse_args(argv)
        report = plan(args)
        if args.plot:
            from megatron_mlra.planner.plot import draw

            draw(report, Path(args.plot))
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        print_report(report, details=args.details)
    return 0 if report.plans else 1


def plan(args: argparse.Namespace) -> Report:
    """The report that parsed flags ask for.

    Raises:
        ValueError: one line that names the flag and the fix.
    """
    if args.plot:
        check_figure(args.plot, "--plot")
    gpu = find(args.gpu)
    if args.fp8 and not gpu.fp8_tflops:
        raise ValueError(f"--fp8: {gpu.name} has no FP8; leave it out")
    assume = Assumptions(**{f.name: getattr(args, f.name) for f in fields(Assumptions)})
    values = preset_values(args.config)
    shape = shape_of(values, args.seq_length)
    batch = args.global_batch_size or values.get("global_batch_size")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"--global-batch-size is {batch!r}; use a number of sequences")
    asked = {"seq_length": args.seq_length, "global_batch_size": args.global_batch_size}
    asked["fp8_format"] = "hybrid" if args.fp8 else None
    if shape.seq_length > (values.get("max_position_embeddings") or shape.seq_length):
        asked["max_position_embeddings"] = shape.seq_length

    def command(layout: Layout) -> list[str]:
        given = {name: value for name, value in asked.items() if value is not None}
        lines = launch_command(args.config, layout, shape, values, given, args.gpus_per_node)
        if keys := left_over(layout, shape, values):
            lines.append(f"  # with a copy of the preset that has no {', '.join(keys)}")
        positions = values.get("max_position_embeddings")
        if args.fp8 and (sizes := fp8_sizes(layout, shape, positions)):
            lines.append(f"  # FP8 takes multiples of 16 on a rank: with {', '.join(sizes)}")
        return lines

    return build(
        name=preset_name(args.config),
        command=command,
        shape=shape,
        gpus=args.gpus,
        gpu=gpu,
        global_batch=batch,
        assume=assume,
        tp_layout=args.tp_layout,
        cp=args.cp,
        fp8=args.fp8,
        top=args.top,
        contexts=tuple(args.contexts),
        decode_gpus=args.decode_gpus,
        decode_batch=args.decode_batch,
    )


def shape_of(values: dict[str, Any], seq_length: int | None = None) -> ModelDescription:
    """The model of a preset's values.

    Args:
        values: see `preset_values`.
        seq_length: replaces the preset's.

    Raises:
        ValueError: a size is missing or invalid, or the model has multi-token prediction.
    """
    try:
        shape = from_megatron_args({"swiglu": True} | values)
    except TypeError as error:
        raise ValueError(f"--config: a size is not a number ({error})") from None
    if seq_length is not None:
        shape = replace(shape, seq_length=seq_length)
    if shape.mtp_num_layers:
        _refuse(
            f"mtp_num_layers is {shape.mtp_num_layers}: the planner does not know multi-token"
            " prediction; leave it out"
        )
    if shape.seq_length < 1:
        raise ValueError(f"--seq-length is {shape.seq_length}; use at least 1")
    return shape


def of_a_run(message: str, known: Collection[str]) -> str | None:
    """The refusal of a flag that `mlra pretrain` has and `mlra plan` has not; None for others.

    Args:
        message: argparse's error.
        known: the flags of `mlra plan`.
    """
    unknown = re.match(r"unrecognized arguments: --(?:no-)?([a-z][\w-]*)", message)
    if not unknown:
        return None
    name = flag(unknown[1])
    key = name.removeprefix("--").replace("-", "_")
    if is_elsewhere(name, known) or key not in KEYS.read_text(encoding="utf-8").split():
        return None
    return (
        f"{name} is a flag of mlra pretrain; plan a preset of your own that has it (base: PRESET,"
        f" {key}: ...), or give it to mlra pretrain --config PRESET --dry-run GPUS"
    )


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
