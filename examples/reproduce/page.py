"""Makes the results page: one HTML file beside its pictures, which a browser opens from disk."""

from __future__ import annotations

import html
import re
from typing import Any

import figures
from comparison import LEVEL, MAIN
from ladder import Ladder, mean_loss

Table = tuple[str, list[str], list[list[str]]]
"""Title, head, rows."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>megatron-mlra: evidence</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24; background: #fff }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }}
th, td {{ border-bottom: 1px solid #d5dae0; padding: .25rem .45rem; text-align: right;
  white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
figure {{ margin: 1.5rem 0 }}
figcaption {{ color: #57606a; font-size: 14px }}
img {{ max-width: 100%; height: auto }}
</style>
<h1>Does MLRA earn its four softmaxes?</h1>
<p>Equal parameters, the same text in the same order, several seeds. How the runs are made and
judged was written before they were: <a href="../evidence.md">evidence.md</a>. Made from the files
of docs/results/evidence by examples/reproduce/report.py.</p>
<h2>The rule</h2>
<p>{rule}</p>
<h2>What is there</h2>
{notes}
{pictures}
{tables}
<h2>Every run</h2>
<div class=wide><table>
<tr><th>run</th><th>mean held-out loss</th><th>tokens/s</th><th>device</th><th>commit</th></tr>
{runs}
</table></div>
</html>
"""


def page(
    tables: list[Table], pictures: list[tuple[str, str]], notes: list[str], ladder: Ladder
) -> str:
    """The page's HTML.

    Args:
        pictures: (name of the file, caption).
        notes: paragraphs, with Markdown's backquotes for code.
    """
    names = ", ".join(figures.NAMES[name] for name in MAIN)
    rule = (
        "The measure is the mean of the losses (nats per token) of the held-out sets. A difference"
        " to MLA counts where the p-value of Welch's t-test over seeds, corrected by Holm's method,"
        f" is below {LEVEL}; {names} are one family of comparisons, all others another. A"
        " difference that does not count is none, whatever its sign. Intervals are of 95 %, not"
        " corrected."
    )
    return PAGE.format(
        rule=html.escape(rule),
        notes="\n".join(f"<p>{_text(note)}</p>" for note in notes),
        pictures="\n".join(
            f'<figure><img src="{file}" alt="{html.escape(what)}">'
            f"<figcaption>{html.escape(what)}</figcaption></figure>"
            for file, what in pictures
        ),
        tables="\n".join(map(_table, tables)),
        runs="\n".join(map(_run, ladder.done().values())),
    )


def _text(note: str) -> str:
    """A note's HTML: text in backquotes becomes `<code>`."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(note))


def _run(result: dict[str, Any]) -> str:
    loss = "diverged" if result.get("diverged") else f"{mean_loss(result):.4f}"
    speed = f"{result['tokens_per_second']:,}" if result.get("tokens_per_second") else ""
    cells = (loss, speed, result["device"], result["commit"])
    name = html.escape(result["id"])
    first = f'<td><a href="evidence/{name}.json">{name}</a></td>'
    return f"<tr>{first}{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in cells)}</tr>"


def _table(table: Table) -> str:
    title, head, rows = table

    def cell(text: str, tag: str) -> str:
        bold = text.startswith("**")
        inner = html.escape(text.strip("*"))
        return f"<{tag}>{f'<b>{inner}</b>' if bold else inner}</{tag}>"

    lines = ["".join(cell(text, "th") for text in head)]
    lines += ["".join(cell(text, "td") for text in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<h2>{html.escape(title)}</h2>\n<div class=wide><table>\n{body}\n</table></div>"
