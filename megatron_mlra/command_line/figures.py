"""The common look of all figures: 1,200 x 700 pixels, one colour per kind of attention, plain
numbers on the axes, and a legend that covers no data.

`COLOURS` is the only table of colours. matplotlib is imported only when a figure is drawn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_mlra.command_line.parser import written_whole

SIZE, DPI = (12, 7), 100
K = 1024

COLOURS = {
    "MLRA-4": "#0b6fb8",
    "MLRA-4 gated": "#6cb4ee",
    "MLRA-4 unscaled": "#173f6b",
    "MLRA-2": "#14a098",
    "MLRA-8": "#5b4fc7",
    "MLA": "#c8501e",
    "MLA gated": "#f0a170",
    "GLA-2": "#2e8b3d",
    "GLA-2 gated": "#79c48a",
    "GLA-4": "#a3c644",
    "MHA": "#1a1a1a",
    "GQA": "#7a7a7a",
    "GQA gated": "#b5b5b5",
    "MQA": "#d4a106",
    "GTA": "#b03a8c",
    "MFA": "#8c6239",
    "TPA": "#a98fd0",
}

OTHERS = ("#1b1b1b", "#e07b39", "#2b7bba", "#c23b80", "#4f9d45", "#8a6bbf", "#a87f32", "#4fb3bf")
"""Colours of series that are not kinds of attention: recipes, parts of a step."""


def colour(name: str) -> str | None:
    """The colour of the kind of attention that `name` begins with ('GQA-8 whole' has the colour of
    GQA), or None."""
    name = re.sub(r"^stock-mla(-fused)?", "MLA", name)
    fits = [kind for kind in COLOURS if re.match(rf"{re.escape(kind)}(?![\w])", name)]
    return COLOURS[max(fits, key=len)] if fits else None


def colours(names: Iterable[str]) -> dict[str, str]:
    """Name -> colour: that of the kind of attention, else the next of `OTHERS`."""
    free, found = iter(OTHERS * 9), {}
    for name in names:
        found[name] = colour(name) or next(free)
    return found


def tokens(count: float) -> str:
    """A number of tokens, round: '512', '8K', '1M'."""
    for unit, name in ((K * K, "M"), (K, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.4g}"


def pyplot() -> Any:
    """matplotlib's pyplot, set up to draw into files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.alpha": 0.3,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
        }
    )
    return plt


def sheet(rows: int = 1, columns: int = 1, **ratios: Any) -> tuple[Any, Any]:
    """A figure of the common size, and its axes `[rows][columns]`."""
    return pyplot().subplots(
        rows, columns, figsize=SIZE, dpi=DPI, layout="constrained", squeeze=False, **ratios
    )


def token_ticks(axis: Any, counts: Iterable[float]) -> None:
    """Put ticks at these numbers of tokens and nowhere else."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    places = sorted(set(counts))
    axis.set_major_locator(FixedLocator(places))
    axis.set_major_formatter(FixedFormatter([tokens(count) for count in places]))
    axis.set_minor_locator(NullLocator())


def plain_log(axis: Any) -> None:
    """Label a logarithmic axis with plain round numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7), numticks=40))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_locator(NullLocator())


def from_zero(panel: Any) -> None:
    """Let the vertical axis go from 0 to 8% above the highest line."""
    panel.set_ylim(0, 1.08 * max(max(line.get_ydata()) for line in panel.get_lines()))


def title(figure: Any, text: str, source: str = "") -> None:
    """Set the figure's title: its statement, and in a second line where that was measured."""
    said = f"{text}\n{source}" if source else text
    figure.suptitle(said, x=0.01, ha="left", fontsize=12.5, weight="bold")


def legend_below(figure: Any, handles: list[Any], columns: int = 5) -> None:
    """Draw one legend for all axes, below them."""
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), frameon=False
    )


def save(figure: Any, path: Path) -> None:
    """Write the file whole or not at all, and close the figure."""
    with written_whole(path) as partial:
        figure.savefig(partial, format=path.suffix.lstrip("."), dpi=DPI)
    pyplot().close(figure)
