"""Command line of `mlra analyze`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mlra.checkpoint.files.tracker import a_checkpoint
from megatron_mlra.command_line import parser as command_line
from megatron_mlra.command_line.early import reads, writes
from megatron_mlra.command_line.numbers import whole
from megatron_mlra.command_line.parser import OneLineParser
from megatron_mlra.command_line.results import check_figure, check_json
from megatron_mlra.data.prefixes import a_dataset
from megatron_mlra.description.model import DTYPES
from megatron_mlra.evaluation.inputs import add_inputs, check_tokens, read_inputs, run

LONGEST = 1024
"""Most tokens per window by default: the cost of attention is quadratic in the window."""


def parser() -> OneLineParser:
    """The flags."""
    command = OneLineParser(
        description="What the attention of a latent model (MLA, GLA-n, MLRA-n) does by layer:"
        " variance of keys, entropy, likeness of branches, ranks, what ablating a branch costs.",
    )
    checkpoint = command.add_argument(
        "checkpoint",
        help="a run's --save folder, its iter_* folder, an exported or research folder",
    )
    reads(checkpoint, a_checkpoint)
    data = command.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="NAME=PREFIX",
        help="datasets of `mlra preprocess`, each with a name for the report",
    )
    reads(data, a_dataset)
    add_inputs(command)
    command.add_argument(
        "--tokens",
        type=whole(2),
        default=8192,
        help="tokens taken of each dataset or text, in windows spread evenly over it"
        " (default: 8,192)",
    )
    command.add_argument(
        "--max-length",
        type=whole(2),
        help=f"tokens per window; default: the model's, {LONGEST:,} at most",
    )
    command.add_argument(
        "--no-ablation",
        action="store_false",
        dest="ablate",
        help="leave out the ablations, which take most of the time",
    )
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)"
    )
    json_file = command.add_argument("--json", metavar="FILE", help="write the numbers here")
    plot = command.add_argument(
        "--plot", metavar="FILE", help="draw them here (.png, .svg or .pdf)"
    )
    writes(json_file, check_json)
    writes(plot, check_figure)
    command.together.append(_check)
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for wrong input."""
    return run(parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    found = _analyze(args)
    if args.json:
        command_line.write_json(args.json, found)
    if args.plot:
        from megatron_mlra.evaluation.analysis.plots import draw

        draw(found, Path(args.plot))


def _check(args: argparse.Namespace) -> None:
    """Check the flags before any file is read.

    Raises:
        ValueError: names the flag and the fix.
    """
    if not args.data and not args.text:
        raise ValueError("nothing to analyze on; give held-out text by --data or --text")
    if args.json:
        check_json(args.json, "--json")
    if args.plot:
        check_figure(args.plot, "--plot")


def _analyze(args: argparse.Namespace) -> dict[str, Any]:
    _check(args)
    texts, streams = read_inputs(args)

    from megatron_mlra.checkpoint.formats import open_checkpoint
    from megatron_mlra.evaluation.analysis.passes import Passes, spread
    from megatron_mlra.evaluation.analysis.report import LEGEND, table, verdict
    from megatron_mlra.evaluation.models import (
        check_device,
        end_of_document,
        load_model,
        load_tokenizer,
    )
    from megatron_mlra.evaluation.token_stream import windows

    device = check_device(args.device, args.dtype)
    source = open_checkpoint(args.checkpoint, verify=args.verify)
    shape = source.description
    if shape.attention != "mlra":
        raise ValueError(
            f"{args.checkpoint} is {shape.variant}, which has no latents to analyze; give a"
            " checkpoint of MLA, GLA-n or MLRA-n"
        )
    first = shape.eod_token_id
    if texts or first is None:
        tokenizer = load_tokenizer(source, args.tokenizer)
        first = end_of_document(tokenizer, args.checkpoint)
        for file, text in texts.items():
            ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            check_tokens(file, len(ids))
            streams[file] = np.asarray(ids)
    length = args.max_length or min(shape.max_position_embeddings, LONGEST)
    chosen = []
    for name, stream in streams.items():
        if int(stream.max()) >= shape.vocab_size:
            raise ValueError(
                f"{name} holds token {int(stream.max())} and the model has {shape.vocab_size};"
                " give data made with the model's tokenizer"
            )
        chosen += spread(list(windows(stream, first, length)), args.tokens)

    from megatron_mlra.command_line.progress_bar import bar

    passes = Passes(load_model(source, args.dtype).to(device), device, args.ablate)
    with bar(desc="analyzing", total=len(chosen) * passes.steps(), unit="passes") as progress:
        for window in chosen:
            passes.add(window, progress.update)
    found = {
        "checkpoint": args.checkpoint,
        "variant": shape.variant,
        "branches": shape.num_branches,
        "latent_heads": shape.num_latent_heads,
        "latent_dim": shape.kv_lora_rank // shape.num_latent_heads,
        "variance_scaling": shape.variance_scaling,
        "calibration": shape.hidden_size * shape.num_latent_heads / shape.kv_lora_rank,
        "sets": list(streams),
        "dtype": args.dtype,
        **passes.result(),
    }
    print(f"{shape.variant}, loss {found['loss']:.4f} nats per token on {found['tokens']:,} tokens")
    print(table(found))
    print(LEGEND)
    for line in verdict(found):
        print(line)
    return found
