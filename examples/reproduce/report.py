"""Tables, figures and the results page from the runs of a ladder.

    python examples/reproduce/report.py --results RESULTS --docs DOCS

Replaces the text between the two markers of DOCS/evidence.md, and writes
DOCS/results/evidence_*.png and DOCS/results/index.html.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import figures
import figures_beyond
import page
import report_beyond
from comparison import MEAN, REFERENCE, Row, compare, difference, smallest_detectable
from ladder import Ladder
from megatron_mlra.command_line.parser import OneLineParser, run, write_text
from page import Table

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
"""The markers of evidence.md."""
SWEEP = "sweep"
"""The phase that sweeps the learning rate."""
SPEEDS = "speeds"
"""Folder below the results: of the runs of speeds.yaml."""


def number(value: float, sign: str = "") -> str:
    """A number with four decimals; '' for NaN."""
    return "" if math.isnan(value) else f"{value:{sign}.4f}"


def quality(rows: list[Row], title: str) -> Table:
    """A table of losses, standard errors, differences to MLA, and which differences count."""
    sets = list(rows[0].results[0]["held_out"]) if rows[0].results else []
    head = ["mechanism", "parameters", "peak rate", "seeds", *sets, MEAN, "standard error"]
    head += ["difference to MLA", "95 % interval", "p (Holm)", "counts"]
    reference = next((row for row in rows if row.mechanism == REFERENCE and row.results), None)
    body = []
    for row in rows:
        name = figures.NAMES[row.mechanism]
        if not row.results:
            body.append([name, "", "", f"0 ({row.diverged} diverged)", *[""] * (len(head) - 4)])
            continue
        first = row.results[0]
        seeds = str(len(row.results)) + (f" ({row.diverged} diverged)" if row.diverged else "")
        line = [name, f"{first['parameters']:,}", f"{first['peak_lr']:.2e}", seeds]
        line += [number(row.mean(each)) for each in (*sets, MEAN)] + [number(row.error())]
        if row is reference or reference is None:
            line += [""] * 4
        else:
            delta, low, high = difference(row, reference)
            interval = "" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}"
            tested = ["", ""]
            if row.p is not None:
                tested = [f"{row.p:.3f}", "yes" if row.counts else "no"]
            line += [number(delta, "+"), interval, *tested]
        body.append(line)
    return title, head, body


def seeds(rows: list[Row], title: str) -> Table:
    """A table of every run's measure: a row per mechanism, a column per seed. A run that is missing
    or diverged has an empty cell."""
    columns = sorted({result["seed"] for row in rows for result in row.results})
    body = []
    for row in rows:
        found = {r["seed"]: loss for r, loss in zip(row.results, row.losses(), strict=True)}
        cells = [number(found[seed]) if seed in found else "" for seed in columns]
        body.append([figures.NAMES[row.mechanism], *cells])
    return title, ["mechanism", *(f"seed {seed}" for seed in columns)], body


def gates(rows: list[Row]) -> str | None:
    """A sentence on MLRA-4 and MLA, both with a gate; None until both have a run."""
    gated = {row.mechanism: row for row in rows if row.results}
    if not {"mlra4-gated", "mla-gated"} <= set(gated):
        return None
    delta, low, high = difference(gated["mlra4-gated"], gated["mla-gated"])
    interval = f"95 % interval {number(low, '+')} to {number(high, '+')}; "
    interval = "" if math.isnan(low) else interval
    return f"MLRA-4 gated minus MLA gated: {number(delta, '+')} ({interval}not tested)."


def cost(rows: list[Row], timed: list[dict[str, Any]], title: str) -> Table:
    """A table of the KV cache's bytes per token and of training's tokens per second.

    Args:
        timed: the runs whose speed may be taken: those of mechanism and size, alone on a GPU.
    """
    head = ["mechanism", "KV bytes per token, TP1", "per device, TP4", "TP8"]
    head += ["tokens/s, median", "devices"]
    body = []
    for row in (row for row in rows if row.results):
        kv = row.results[0]["kv_bytes_per_token"]
        found = row.speeds(timed)
        # Some runs shared their GPU with other programs for a while.
        speed = f"{median(chain(*found.values())):,.0f}" if found else ""
        devices = ", ".join(sorted(found))
        cells = [f"{kv[tp]:,}" for tp in ("1", "4", "8")]
        body.append([figures.NAMES[row.mechanism], *cells, speed, devices])
    return title, head, body


def sweep_table(results: list[dict[str, Any]], title: str) -> Table:
    """A table of the sweep's losses: a row per mechanism, a column per learning rate, the best loss
    in bold."""
    from ladder import mean_loss

    rates = sorted({r["peak_lr"] for r in results})
    body = []
    for mechanism, name in figures.NAMES.items():
        found = {r["peak_lr"]: mean_loss(r) for r in results if r["mechanism"] == mechanism}
        if found:
            lowest = min(found.values())
            best = lowest if math.isfinite(lowest) else None
            cells = ["" if r not in found else _swept(found[r], found[r] == best) for r in rates]
            body.append([name, *cells])
    return title, ["mechanism", *(f"{rate:.2e}" for rate in rates)], body


def _swept(loss: float, is_best: bool) -> str:
    text = "diverged" if math.isinf(loss) else f"{loss:.4f}"
    return f"**{text}**" if is_best else text


def markdown(table: Table) -> str:
    """A table in GitHub's Markdown."""
    title, head, rows = table
    lines = [head, ["---"] * len(head), *rows]
    return f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        file: its name in docs/results.
        what: its caption.
        draw: writes the figure to a path.
    """

    file: str
    what: str
    draw: Callable[[Path], None]


def sections(ladder: Ladder) -> tuple[list[Table], list[Picture], list[str]]:
    """The tables, figures and paragraphs of the report."""
    results = list(ladder.done().values())
    timed = [*results, *Ladder(ladder.file, ladder.results / SPEEDS).done().values()]
    tables: list[Table] = []
    pictures: list[Picture] = []
    notes: list[str] = []
    behind = [phase for phase in ladder.told["phases"] if "base" in phase]
    phases = [p for p in ladder.told["phases"] if "rate_of" in p and p not in behind]
    for name in dict.fromkeys(phase["name"] for phase in phases):
        planned = {m: p["seeds"] for p in phases if p["name"] == name for m in p["mechanisms"]}
        rows = compare(results, name, planned)
        if not any(row.results for row in rows):
            notes.append(f"Size `{name}`: no run is finished.")
            continue
        first = next(row for row in rows if row.results).results[0]
        what = f"{first['without_embedding'] / 1e6:.1f} M without embedding"
        what += f", {first['train_tokens'] / 1e6:.1f} M tokens"
        ratio = first["train_tokens"] / first["parameters"]
        said = "Too few seeds to compare: nothing counts yet."
        if bound := number(smallest_detectable(rows)):
            said = (
                f"{_sentence(figures.verdict(rows))} With the spread seen here, a difference below"
                f" {bound} nats would mostly be missed."
            )
        notes.append(
            f"Size `{name}`: {ratio:.1f} tokens per parameter ({first['parameters'] / 1e6:.1f} M in"
            f" all). {said}"
        )
        if compared := gates(rows):
            notes.append(compared)
        tables.append(quality(rows, f"Held-out loss, size {name} ({what})"))
        tables.append(seeds(rows, f"Each run's mean held-out loss, size {name}"))
        tables.append(cost(rows, timed, f"Cost, size {name}"))
        pictures += [
            Picture(
                f"evidence_{name}.png",
                f"held-out loss over KV bytes per device and over training time, size {name}",
                partial(figures.pareto, rows, timed, what=f"Size {name}"),
            ),
            Picture(
                f"evidence_{name}_training.png",
                f"training loss, size {name}",
                partial(figures.curves, rows, what=f"Size {name}"),
            ),
        ]
    swept = [r for r in results if r["phase"] == SWEEP]
    if swept:
        title = "Sweep of the peak learning rate, half of the steps, one seed"
        tables.append(sweep_table(swept, title))
        draw = partial(figures.sweep, swept)
        pictures.append(Picture("evidence_sweep.png", "sweep of the peak learning rate", draw))
    for phase in behind:
        rows = report_beyond.grouped(results, phase["name"])
        size = phase["size"]
        if not rows:
            notes.append(f"Beyond the loss, size `{size}`: no run is finished.")
            continue
        lost = report_beyond.diverged(results, phase["name"])
        notes.append(report_beyond.note(rows, size, phase, lost))
        tables += report_beyond.tables(rows, f"size {size}")
        pictures.append(
            Picture(
                f"evidence_{size}_long.png",
                f"long contexts, size {size}",
                partial(figures_beyond.long_contexts, rows, what=f"Size {size}"),
            )
        )
        if any(row.is_latent() for row in rows):
            pictures.append(
                Picture(
                    f"evidence_{size}_why.png",
                    f"what the attention does by layer, size {size}",
                    partial(figures_beyond.why, rows, what=f"Size {size}"),
                )
            )
    if left := len(ladder.left(ladder.done())) + ladder.waiting(ladder.done()):
        notes.insert(
            0, f"{len(results)} runs are finished, {left} are not: this is not the whole table."
        )
    commits = sorted({r["commit"] for r in results if r["commit"]})
    if commits:
        notes.append(f"Commits: {', '.join(commits)}.")
    return tables, pictures, notes


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def document_part(tables: list[Table], pictures: list[Picture], notes: list[str]) -> str:
    """The text between the markers of evidence.md."""
    parts = [*notes, *(f"![{each.what}](results/{each.file})" for each in pictures)]
    return "\n\n".join([*parts, *map(markdown, tables)])


def placed(document: str, inner: str) -> str:
    """`document` with `inner` in place of the text between the markers.

    Raises:
        ValueError: the document lacks the markers.
    """
    if BEGIN not in document or END not in document:
        raise ValueError(f"evidence.md lacks the lines {BEGIN} and {END}")
    before, after = document.split(BEGIN)[0], document.split(END)[1]
    return f"{before}{BEGIN}\n\n{inner}\n\n{END}{after}"


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = OneLineParser(description=__doc__.split("\n", 1)[0])
    here = Path(__file__).parent
    parser.add_argument("--ladder", type=Path, default=here / "ladder.yaml", help="what is trained")
    parser.add_argument("--results", type=Path, required=True, help="folder of finished runs")
    parser.add_argument("--docs", type=Path, default=here.parents[1] / "docs")
    args = parser.parse_args()
    try:
        ladder = Ladder(args.ladder, args.results)
        document = args.docs / "evidence.md"
        if not ladder.done():
            raise ValueError(f"--results {args.results} holds no finished run")
        folder = args.docs / "results"
        folder.mkdir(exist_ok=True)
        tables, pictures, notes = sections(ladder)
        told = placed(document.read_text(encoding="utf-8"), document_part(tables, pictures, notes))
        for picture in pictures:
            picture.draw(folder / picture.file)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        parser.error(str(error))
    write_text(document, told)
    shown = [(each.file, each.what) for each in pictures]
    write_text(folder / "index.html", page.page(tables, shown, notes, ladder))
    print(f"wrote {document} and {folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    run(main)
