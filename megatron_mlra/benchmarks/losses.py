"""Compare the training losses of runs by what they printed: a table, and the curves in one plot.

    mlra compare-losses bf16=bf16.txt fp8=fp8.txt --png losses.png

Each file is the standard output of mlra pretrain with --log-interval 1. Differences are to the
first run, of the mean loss of the last steps.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from megatron_mlra.command_line.parser import OneLineParser, check_output, write_text

STEP = re.compile(r"^step ([\d,]+)/[\d,]+ \| lm loss ([\d.]+)", re.MULTILINE)
VALIDATION = re.compile(r"^validation at step [\d,]+: lm loss ([\d.]+)", re.MULTILINE)


def read(path: Path) -> dict:
    """Losses of steps 1, 2, ... and the last validation loss, None where there is none.

    Raises:
        ValueError: the file holds no step, or not every step.
    """
    text = path.read_text(errors="replace")
    found = {int(step.replace(",", "")): float(loss) for step, loss in STEP.findall(text)}
    if not found:
        raise ValueError(f"{path} has no line like 'step 1/300 | lm loss ...'")
    if sorted(found) != list(range(1, len(found) + 1)):
        raise ValueError(f"{path} does not hold every step; train with --log-interval 1")
    validation = VALIDATION.findall(text)
    losses = [found[step] for step in sorted(found)]
    return {"losses": losses, "validation": float(validation[-1]) if validation else None}


def table(runs: dict[str, dict], last: int) -> str:
    """Markdown: mean loss of the last steps and validation loss, with differences."""
    lines = [f"| run | mean of the last {last} steps | | validation | |", "|---|---|---|---|---|"]
    first = next(iter(runs.values()))
    base = mean(first["losses"][-last:]), first["validation"]
    for name, found in runs.items():
        cells = [name]
        for value, reference in zip(
            (mean(found["losses"][-last:]), found["validation"]), base, strict=True
        ):
            known = value is not None and reference is not None
            cells += (
                [f"{value:.4f}", f"{100 * (value / reference - 1):+.2f} %"] if known else ["", ""]
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: dict[str, dict], window: int, path: Path) -> None:
    """Losses over steps, and beside them the running mean's difference to the first run's."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    figure, (curves, differences) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    reference = smooth(next(iter(runs.values()))["losses"], window)
    for name, found in runs.items():
        losses = found["losses"]
        curves.plot(range(1, len(losses) + 1), losses, label=name, linewidth=0.8)
        pairs = zip(smooth(losses, window), reference, strict=False)
        change = [100 * (a / b - 1) for a, b in pairs]
        differences.plot(range(window, window + len(change)), change, label=name, linewidth=1)
    curves.set(xlabel="step", ylabel="loss, nats a token", yscale="log")
    curves.yaxis.set_major_formatter(ScalarFormatter())
    curves.yaxis.set_minor_formatter(ScalarFormatter())
    differences.set(xlabel="step", ylabel=f"% from {next(iter(runs))}, mean of {window} steps")
    for ax in (curves, differences):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def smooth(values: list[float], window: int) -> list[float]:
    """Means of `window` neighbours."""
    return [mean(values[i : i + window]) for i in range(len(values) - window + 1)]


def compare(args: argparse.Namespace) -> None:
    """Read, compare, draw."""
    for flag, file in (("--json", args.json), ("--png", args.png)):
        if file:
            check_output(file, flag)
    runs = {}
    for text in args.runs:
        name, equals, file = text.partition("=")
        if not equals:
            raise ValueError(f"{text}: use NAME=FILE")
        runs[name] = read(Path(file))
        if not 0 < args.last <= len(runs[name]["losses"]):
            raise ValueError(f"--last {args.last}: {file} has {len(runs[name]['losses'])} steps")
    print(table(runs, args.last))
    if args.json:
        write_text(args.json, json.dumps(runs) + "\n")
    if args.png:
        plot(runs, args.last, args.png)


def parser() -> OneLineParser:
    """The flags."""
    flags = OneLineParser(description=__doc__.split("\n", 1)[0])
    flags.add_argument("runs", nargs="+", metavar="NAME=FILE", help="the first is compared with")
    flags.add_argument("--last", type=int, default=50, help="steps of a mean (default: 50)")
    flags.add_argument("--json", type=Path, metavar="FILE", help="where to write the losses")
    flags.add_argument("--png", type=Path, metavar="FILE", help="where to draw them")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    flags = parser()
    args = flags.parse_args(argv)
    try:
        compare(args)
    except (OSError, ValueError) as error:
        flags.error(str(error))
