"""The flags, checks and files that the benchmarks of the kernels share."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
import triton
from torch import Tensor


def parser(doc: str, seed: int | None = None) -> argparse.ArgumentParser:
    """A parser with `--json`, `--commit` and `--seed`.

    Args:
        doc: docstring of the benchmark, whose first line is the description.
        seed: default of `--seed`; None takes the clock.
    """
    flags = argparse.ArgumentParser(description=doc.split("\n", 1)[0])
    flags.add_argument("--json", type=output_file, help="where to write the records")
    flags.add_argument("--commit", help="commit to name in the report")
    default = "the clock" if seed is None else seed
    flags.add_argument("--seed", type=whole(0), default=seed, help=f"of inputs; default: {default}")
    return flags


def whole(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` up that a seed or a size can be."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 2**31:
            said = f"{text:.60} is no whole number from {least} to {2**31 - 1}"
            raise argparse.ArgumentTypeError(said)
        return value

    return convert


def seconds(text: str) -> float:
    """An argparse type: a number of seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text:.60} is no number of seconds above 0")
    return value


def parse(flags: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed flags, with a seed. Without a GPU the program exits."""
    args = flags.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a CUDA GPU, and torch sees none")
    if args.seed is None:
        args.seed = time.time_ns() % 2**20
    return args


def header(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Print and return GPU, versions, commit, seed and `more`."""
    about = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "commit": args.commit or commit(), "seed": args.seed, **more,
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in about.items()), flush=True)
    return about


def gathered(cases: Iterable[Any], measure: Callable[[Any], list[dict]]) -> dict[str, list]:
    """`records` of all cases, and `failed`. A case that fails ends the gathering, and the records
    before it are kept, as a peer's fault can leave the GPU unusable; a wrong result (`red`) keeps
    none."""
    records: list[dict] = []
    for case in cases:
        try:
            records += measure(case)
            torch.cuda.empty_cache()
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return {"records": records, "failed": [f"stopped at {case}: {said}"]}
    return {"records": records, "failed": []}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, of norms in float32."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def table(corner: str, records: list[dict], more: dict[str, dict[str, str]] | None = None) -> str:
    """Markdown: a row per `row`, a column per `provider`, and further columns.

    Args:
        corner: head of the first column.
        records: each with `row`, `provider` and `cell`.
        more: head of a further column -> row -> cell.
    """
    names = list(dict.fromkeys(r["provider"] for r in records))
    cells = {(r["row"], r["provider"]): r["cell"] for r in records}
    more = more or {}
    lines = [f"| {' | '.join([corner, *names, *more])} |"]
    lines.append("|---" * (1 + len(names) + len(more)) + "|")
    for row in dict.fromkeys(r["row"] for r in records):
        line = [row, *(cells.get((row, name), "") for name in names)]
        lines.append(f"| {' | '.join([*line, *(each[row] for each in more.values())])} |")
    return "\n".join(lines)


def red(what: str) -> NoReturn:
    """Exit because a result is wrong: then nothing is reported."""
    sys.exit(f"RED: {what}: nothing is reported until it is right")


def finish(
    args: argparse.Namespace,
    report: dict[str, Any],
    last: Any = None,
    draw: Callable[[], None] = lambda: None,
) -> None:
    """Write the report to the file of `--json`, draw, and print it, or `last`, as one line of JSON.
    Where the report's `failed` names something, the program exits with 1."""
    if args.json:
        write_json(args.json, report)
    draw()
    print(json.dumps(report if last is None else last), flush=True)
    if report.get("failed"):
        sys.exit(f"error: {'; '.join(report['failed'])}")


def commit() -> str:
    """The commit of the working directory, or "unknown" outside a repository."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def output_file(name: str) -> str:
    """An argparse type: the name of a file that can be written, in place of nothing but an earlier
    result. A missing folder is made."""
    path = Path(name)
    try:
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{name} is a folder; name a file in it")
        if path.exists() and not path.is_file():
            raise argparse.ArgumentTypeError(f"{name} is no plain file; name another")
        if path.exists() and not _is_result(path.read_bytes()):
            said = f"{name} is there and no result of a benchmark; remove it, or name another file"
            raise argparse.ArgumentTypeError(said)
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"{name}: the folder {path.parent} cannot be made ({error.strerror})"
        raise argparse.ArgumentTypeError(said) from None
    try:
        # A full disk still makes empty files.
        with tempfile.TemporaryFile(dir=path.parent, buffering=0) as tried:
            tried.write(bytes(4096))
    except OSError as error:
        said = f"{name}: the folder {path.parent} cannot be written ({error.strerror})"
        raise argparse.ArgumentTypeError(said) from None
    return name


def _is_result(data: bytes) -> bool:
    """Whether a file is empty, or a figure or records of a benchmark, by the names in it. The file
    may be a stranger's, so it is not parsed."""

    def holds(*keys: str) -> bool:
        return all(f'"{key}"'.encode() in data for key in keys)

    if not data or b"Matplotlib" in data:
        return True
    if data.lstrip().startswith(b"["):  # of mlra_vllm.benchmarks
        return holds("model", "tp")
    return holds("commit", "records")


def write_json(file: str | Path, value: Any) -> None:
    """Write a temporary file, then rename it: an interrupted run leaves an earlier file whole."""
    path = Path(file)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    try:
        with partial.open("x") as opened:
            json.dump(value, opened, indent=1)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
