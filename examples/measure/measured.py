"""The result files, the newest of a piece, and tables of them with a caption below.

A file is named DATE_GPU_PIECE[_COMMIT].json and holds what a benchmark wrote, beside `piece`,
`date`, `gpu`, `commit`, `command` and versions. A file without `piece` has it in its name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT / "docs" / "results", ROOT / "kernels" / "mlra_kernels" / "results")
VERSIONS = {
    "driver": "driver",
    "torch": "torch",
    "triton": "Triton",
    "transformer-engine": "Transformer Engine",
    "megatron-core": "megatron-core",
    "vllm": "vLLM",
}
"""Key of a result -> its name in a caption."""


@dataclass(frozen=True)
class Result:
    """A result file and its content."""

    path: Path
    told: dict[str, Any]

    @property
    def piece(self) -> str:
        """The piece of the queue that wrote it."""
        return self.told.get("piece") or self.path.stem.split("_", 2)[-1]

    @property
    def date(self) -> str:
        """`2026-11-30 10:12`, or the day alone."""
        return self.told.get("date") or self.path.stem[:10]

    @property
    def gpu(self) -> str:
        """Name of the GPU, as torch or nvidia-smi gives it."""
        return self.told.get("gpu") or self.told["device"]

    @property
    def kind(self) -> str:
        """`H200` of `NVIDIA H200`."""
        return kind(self.gpu)

    def facts(self) -> str:
        """GPU, versions, commit and day."""
        told, count = self.told, self.told.get("gpus") or 1
        facts = [f"{count} x {self.gpu}" if count > 1 else self.gpu]
        facts += [f"{name} {told[key]}" for key, name in VERSIONS.items() if told.get(key)]
        return ", ".join([*facts, f"commit {told['commit']}", self.date[:10]])


def kind(gpu: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `H100`; the name without spaces if there is no such word."""
    word = re.search(r"\b[A-Z]+\d+\w*", gpu)
    return word[0] if word else re.sub(r"\W+", "-", gpu)


def brief_caption(sources: Iterable[Result], page: Path) -> str:
    """A link from `page` to each file, with GPU, commit and day."""
    return "; ".join(
        f"[{each.piece.replace('_', ' ')}]({os.path.relpath(each.path, page.parent)}):"
        f" {each.kind}, {each.told['commit']}, {each.date[:10]}"
        for each in sources
    )


def caption(sources: Iterable[Result], page: Path, commands: bool = True) -> str:
    """For results with the same facts once: the facts, links from `page` to the files, and the
    commands."""
    alike: dict[str, list[Result]] = {}
    for source in sources:
        alike.setdefault(source.facts(), []).append(source)
    said = []
    for facts, group in alike.items():
        pieces = " and ".join(each.piece.replace("_", " ") for each in group)
        facts = f"{pieces}: {facts}" if len(alike) > 1 else facts
        links = [f"[data]({os.path.relpath(each.path, page.parent)})" for each in group]
        run = [f"`{e.told['command']}`" for e in group if commands and e.told.get("command")]
        said.append(f"{facts} ({', '.join(links)}){''.join(f', {each}' for each in run)}")
    return "; ".join(said)


def results(piece: str | None = None, folders: Iterable[Path] | None = None) -> list[Result]:
    """The results of a piece, or all, the oldest first; of FOLDERS if no others are given.

    Raises:
        ValueError: a file is no JSON, or not of a benchmark; names it.
    """
    found = []
    for path in (path for folder in folders or FOLDERS for path in folder.glob("[0-9]*.json")):
        try:
            told = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error})") from None
        _check(path, told)
        result = Result(path, told)
        if piece is None or result.piece == piece:
            found.append(result)
    return sorted(found, key=lambda result: (result.date, result.path.name))


def _check(path: Path, told: Any) -> None:
    if not isinstance(told, dict):
        raise ValueError(f"{path} is no result: it holds no object; move it away")
    for key in ("piece", "date", "gpu", "device", "commit", "command"):
        if not isinstance(told.get(key, ""), str):
            raise ValueError(f"{path} is no result: {key} is {told[key]!r:.60}; move it away")
    if not isinstance(told.get("seconds", 0), int | float):
        raise ValueError(f"{path} is no result: seconds is {told['seconds']!r:.60}; move it away")


def newest(piece: str, gpu: str = "") -> Result:
    """The newest result of a piece, on a kind of GPU if one is named.

    Raises:
        ValueError: there is none.
    """
    found = [result for result in results(piece) if gpu in ("", result.kind)]
    if not found:
        on = f" on an {gpu}" if gpu else ""
        raise ValueError(f"there is no result of {piece}{on}; run measure.py --only {piece}")
    return found[-1]


Cells = dict[tuple[str, str], str]
"""(Row, column) -> text."""


@dataclass
class Table:
    """A table, the results it is made of, and what the caption says besides."""

    sources: list[Result]
    lines: list[list[str]]
    """The head first."""
    note: str = ""
    commands: bool = True
    """Whether the caption has the commands."""
    brief: bool = False
    """Whether the caption leaves versions and commands to the files."""

    def text(self, page: Path) -> str:
        rows = [
            f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in line)}|" for line in self.lines
        ]
        brief = brief_caption(self.sources, page) if self.brief else None
        said = f"{brief or caption(self.sources, page, self.commands)}. {self.note}".rstrip()
        return "\n".join(["", rows[0], "|---" * len(self.lines[0]) + "|", *rows[1:], "", said])


TABLES: dict[str, Callable[[], Table]] = {}
"""Name in a page's mark -> what makes the table."""


def table(make: Callable[[], Table]) -> Callable[[], Table]:
    """A function that makes the table of its name, with dashes."""
    TABLES[make.__name__.replace("_", "-")] = make
    return make


def grid(corner: str, cells: Cells, columns: Iterable[str] = ()) -> list[list[str]]:
    """Lines of a table; rows and columns in the order of the cells, or the columns given."""
    heads = list(columns) or list(dict.fromkeys(column for _, column in cells))
    rows = dict.fromkeys(row for row, _ in cells)
    return [[corner, *heads], *([row, *(cells.get((row, c), "") for c in heads)] for row in rows)]


def size(tokens: int) -> str:
    """2048 -> 2K, 2097152 -> 2M."""
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}K"


def shape(record: dict[str, Any]) -> str:
    """Batch and context of a record: 32 x 8K."""
    return f"{record['batch']} x {size(record['context'])}"


def error(value: float) -> str:
    """0.0137 -> 1.4e-2, 0 -> 0."""
    return f"{value:.1e}".replace("e-0", "e-").removesuffix("e+00") if value else "0"
