"""Compare the training losses of runs: a table, and the curves in one plot.

    mlra compare-losses bf16=runs/bf16 fp8=runs/fp8 --png losses.png

Each run is given as its --save folder, an event file of TensorBoard, its megatron.log, or a file
with its printed output. A run's losses are means over the steps between two lines of its log, for
any --log-interval; the table says over which steps. Differences are relative to the first run. A
file that --json wrote stands for all runs in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_mlra.benchmarks.losses_files import Run, read, read_json
from megatron_mlra.benchmarks.losses_plot import plot
from megatron_mlra.command_line.early import writes
from megatron_mlra.command_line.numbers import whole
from megatron_mlra.command_line.parser import OneLineParser, write_json
from megatron_mlra.command_line.results import check_figure, check_json


def table(runs: dict[str, Run], last: int) -> str:
    """A Markdown table: mean loss of the last steps and validation loss, with differences."""
    lines = ["| run | mean of steps | loss | | validation | |", "|---|---|---|---|---|---|"]
    reference = next(iter(runs.values()))
    base, *base_steps = reference.tail(last)
    for name, run in runs.items():
        loss, *steps = run.tail(last)
        cells = [name, f"{steps[0]:,} to {steps[1]:,}"]
        for value, wanted, comparable in (
            (loss, base, steps == base_steps),
            (run.validation, reference.validation, True),
        ):
            cells.append("" if value is None else f"{value:.4f}")
            known = comparable and None not in (value, wanted)
            cells.append(f"{100 * (value / wanted - 1):+.2f} %" if known else "")
        lines.append("| " + " | ".join(cells) + " |")
    if any(run.tail(last)[1:] != reference.tail(last)[1:] for run in runs.values()):
        lines += ["", "Means of other steps than the first run's are not compared with it."]
    return "\n".join(lines)


def compare(args: argparse.Namespace) -> None:
    """Read the runs, print the table, write the outputs.

    Raises:
        ValueError: an argument or a run is wrong.
    """
    if args.json:
        check_json(args.json, "--json")
    if args.png:
        check_figure(args.png, "--png")
    runs: dict[str, Run] = {}
    for text in args.runs:
        name, equals, file = text.partition("=")
        if equals and name:
            found = {name: read(Path(file))}
        elif text.endswith(".json"):
            found = read_json(Path(text))
        else:
            raise ValueError(f"{text}: use NAME=FOLDER, NAME=FILE or a file that --json wrote")
        if twice := runs.keys() & found:
            raise ValueError(
                f"{text}: {min(twice)} names another run already; give it another name"
            )
        runs |= found
    for name, run in runs.items():
        if args.last > run.steps[-1]:
            raise ValueError(
                f"--last {args.last}: {name} has {run.steps[-1]} steps; use at most that"
            )
    print(table(runs, args.last))
    if args.json:
        told = {name: asdict(run) for name, run in runs.items()}
        write_json(args.json, told)
    if args.png:
        plot(runs, args.last, args.png)


def parser() -> OneLineParser:
    """The flags."""
    flags = OneLineParser(
        description="Compare the training losses of runs: a table, and the curves in one plot."
    )
    flags.add_argument(
        "runs",
        nargs="+",
        metavar="NAME=RUN",
        help="a name, and the run's --save folder, event file, megatron.log or printed output; the"
        " others are compared with the first",
    )
    flags.add_argument(
        "--last", type=whole(1), default=50, help="last steps to take the mean of (default: 50)"
    )
    add = flags.add_argument
    writes(add("--json", type=Path, metavar="FILE", help="where to write the losses"), check_json)
    writes(add("--png", type=Path, metavar="FILE", help="where to draw them"), check_figure)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    flags = parser()
    args = flags.parse_args(argv)
    try:
        compare(args)
    except (OSError, ValueError) as error:
        flags.error(str(error))
