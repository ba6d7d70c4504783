"""Tables, figures and the results page from the runs of a ladder.

    python examples/reproduce/report.py --results RESULTS --docs DOCS

Replaces what lies between the two markers of DOCS/evidence.md and writes
DOCS/results/evidence_*.png and DOCS/results/index.html, which opens from disk.
"""

from __future__ import annotations

import html
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import figures
from comparison import MEAN, REFERENCE, Row, compare, difference, smallest_detectable
from ladder import Ladder
from megatron_mlra.command_line.parser import OneLineParser, run, write_text

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
SWEEP = "sweep"

Table = tuple[str, list[str], list[list[str]]]
"""Title, head, rows."""


def number(value: float, sign: str = "") -> str:
    """Four decimals; nothing for NaN."""
    return "" if math.isnan(value) else f"{value:{sign}.4f}"


def quality(rows: list[Row], title: str) -> Table:
    """Losses, standard errors, differences to MLA and which of them count."""
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
            p = "" if row.p is None else f"{row.p:.3f}"
            line += [number(delta, "+"), interval, p, "yes" if row.counts else "no"]
        body.append(line)
    return title, head, body


def seeds(rows: list[Row], title: str) -> Table:
    """The measure of every run."""
    most = max((len(row.results) for row in rows), default=0)
    body = [
        [figures.NAMES[row.mechanism], *map(number, row.losses())]
        + [""] * (most - len(row.results))
        for row in rows
    ]
    return title, ["mechanism", *(f"seed {n}" for n in range(1, most + 1))], body


def cost(rows: list[Row], title: str) -> Table:
    """The cache's bytes and the speed of training."""
    head = ["mechanism", "KV bytes per token, TP1", "per device, TP4", "TP8", "tokens/s", "devices"]
    body = []
    for row in (row for row in rows if row.results):
        kv = row.results[0]["kv_bytes_per_token"]
        speeds = [r["tokens_per_second"] for r in row.results if r["tokens_per_second"]]
        speed = f"{min(speeds):,} to {max(speeds):,}" if speeds else ""
        devices = ", ".join(sorted({r["device"] for r in row.results}))
        cells = [f"{kv[tp]:,}" for tp in ("1", "4", "8")]
        body.append([figures.NAMES[row.mechanism], *cells, speed, devices])
    return title, head, body


def sweep_table(results: list[dict[str, Any]], title: str) -> Table:
    """The sweep's losses: a row for each mechanism, a column for each rate."""
    from ladder import mean_loss

    rates = sorted({r["peak_lr"] for r in results})
    body = []
    for mechanism, name in figures.NAMES.items():
        found = {r["peak_lr"]: mean_loss(r) for r in results if r["mechanism"] == mechanism}
        if found:
            best = min(found, key=found.__getitem__)
            cells = ["" if r not in found else _swept(found[r], r == best) for r in rates]
            body.append([name, *cells])
    return title, ["mechanism", *(f"{rate:.2e}" for rate in rates)], body


def _swept(loss: float, is_best: bool) -> str:
    text = "diverged" if math.isinf(loss) else f"{loss:.4f}"
    return f"**{text}**" if is_best else text


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown."""
    title, head, rows = table
    lines = [head, ["---"] * len(head), *rows]
    return f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_html(table: Table) -> str:
    """The same table for the page."""
    title, head, rows = table

    def cell(text: str, tag: str) -> str:
        bold = text.startswith("**")
        inner = html.escape(text.strip("*"))
        return f"<{tag}>{f'<b>{inner}</b>' if bold else inner}</{tag}>"

    lines = ["".join(cell(text, "th") for text in head)]
    lines += ["".join(cell(text, "td") for text in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<h2>{html.escape(title)}</h2>\n<div class=wide><table>\n{body}\n</table></div>"


def sections(ladder: Ladder, folder: Path) -> tuple[list[Table], list[tuple[str, str]], list[str]]:
    """Tables, figures (file, what it shows) and lines of text; draws the figures into `folder`."""
    results = list(ladder.done().values())
    tables: list[Table] = []
    pictures: list[tuple[str, str]] = []
    notes: list[str] = []
    for name in dict.fromkeys(p["name"] for p in ladder.told["phases"] if "rate_of" in p):
        rows = compare(results, name)
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
        gated = {row.mechanism: row for row in rows if row.results}
        if {"mlra4-gated", "mla-gated"} <= set(gated):
            delta, low, high = difference(gated["mlra4-gated"], gated["mla-gated"])
            notes.append(
                f"MLRA-4 gated minus MLA gated: {number(delta, '+')} (95 % interval"
                f" {number(low, '+')} to {number(high, '+')}; not tested)."
            )
        tables.append(quality(rows, f"Held-out loss, size {name} ({what})"))
        tables.append(seeds(rows, f"Each run's mean held-out loss, size {name}"))
        tables.append(cost(rows, f"Cost, size {name}"))
        figures.loss_against_cache(rows, folder / f"evidence_{name}.png", f"Size {name}")
        figures.curves(rows, folder / f"evidence_{name}_training.png", f"Size {name}")
        pictures.append((f"evidence_{name}.png", f"held-out loss over KV bytes, size {name}"))
        pictures.append((f"evidence_{name}_training.png", f"training loss, size {name}"))
    swept = [r for r in results if r["phase"] == SWEEP]
    if swept:
        tables.append(sweep_table(swept, "Sweep of the peak learning rate, half a pass, one seed"))
        figures.sweep(swept, folder / "evidence_sweep.png")
        pictures.append(("evidence_sweep.png", "sweep of the peak learning rate"))
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


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>megatron-mlra: evidence</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24; background: #fff }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }}
th, td {{ border-bottom: 1px solid #d5dae0; padding: .25rem .6rem; text-align: right;
  white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100%; height: auto }}
</style>
<h1>Does MLRA earn its four softmaxes?</h1>
<p>Equal parameters, the same text in the same order, several seeds. How the runs were made and how
they are judged: <a href="../evidence.md">evidence.md</a>. Made by
examples/reproduce/report.py on {date}.</p>
{notes}
{pictures}
{tables}
</html>
"""


def page(tables: list[Table], pictures: list[tuple[str, str]], notes: list[str]) -> str:
    """The results page."""
    return PAGE.format(
        date=datetime.now(UTC).date(),
        notes="\n".join(f"<p>{html.escape(note)}</p>" for note in notes),
        pictures="\n".join(
            f'<p><img src="{file}" alt="{html.escape(what)}"></p>' for file, what in pictures
        ),
        tables="\n".join(map(as_html, tables)),
    )


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
        text = document.read_text(encoding="utf-8")
        if BEGIN not in text or END not in text:
            raise ValueError(f"{document} lacks the lines {BEGIN} and {END}")
        if not ladder.done():
            raise ValueError(f"--results {args.results} holds no finished run")
        folder = args.docs / "results"
        folder.mkdir(exist_ok=True)
        tables, pictures, notes = sections(ladder, folder)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        parser.error(str(error))
    parts = [*notes, *(f"![{what}](results/{file})" for file, what in pictures)]
    inner = "\n\n".join([*parts, *map(markdown, tables)])
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(document, f"{before}{BEGIN}\n\n{inner}\n\n{END}{after}")
    write_text(folder / "index.html", page(tables, pictures, notes))
    print(f"wrote {document} and {folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    run(main)
