"""Files of results, which a user makes again: one replaces an earlier one, and no other file.

A name that is typed wrongly may be a checkpoint's `config.json`, or the text that was read. An
earlier result is known by what it holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mlra.command_line.foreign_text import parse_json
from megatron_mlra.command_line.parser import check_output, read_text

FIGURES = (".png", ".svg", ".pdf")
_KEYS = (
    {"checkpoint", "text", "data", "task"},  # mlra evaluate
    {"checkpoint", "decoded"},  # the same with --cache-dtype
    {"checkpoint", "variant", "layers"},  # mlra analyze
    {"prompt", "output", "finish_reason", "tokens"},  # each line of mlra generate
    {"commit", "records"},  # mlra benchmark-decoding
    {"matmul_tflops", "rows"},  # mlra benchmark-training
    {"begun", "failed", "rows"},  # the same, while it measures
)
_RUN = {"steps", "losses", "validation"}
"""Keys of each run of mlra compare-losses."""
_DRAWN = b"Matplotlib"
"""Named in each PNG, SVG and PDF that matplotlib writes."""


def check_json(file: str | Path, flag: str) -> None:
    """Make the folder of a result, and check that it can be written there.

    Raises:
        ValueError: see `check_output`; or another file is there. One line that names the flag.
    """
    check_output(file, flag)
    if not _is_free(file) and not _is_result(file):
        raise ValueError(_kept(file, flag, "result"))


def check_figure(file: str | Path, flag: str) -> None:
    """Make the folder of a figure, and check that it can be written there.

    Raises:
        ValueError: the name ends in none of `FIGURES`; see `check_output`; or another file is
            there. One line that names the flag.
    """
    if Path(file).suffix.lower() not in FIGURES:
        kinds = ", ".join(FIGURES)
        raise ValueError(f"{flag} {file} ends in none of {kinds}; use a name that ends in .png")
    check_output(file, flag)
    if not _is_free(file) and _DRAWN not in Path(file).read_bytes():
        raise ValueError(_kept(file, flag, "figure"))


def _is_free(file: str | Path) -> bool:
    """Whether nothing is lost: there is no file, or an empty one, as of `mktemp`."""
    path = Path(file)
    return not path.exists() or not path.stat().st_size


def _kept(file: str | Path, flag: str, what: str) -> str:
    return (
        f"{flag} {file} is there and no {what} of a command, which alone is replaced; remove it, or"
        " name another file"
    )


def _is_result(file: str | Path) -> bool:
    """Whether a file is a result in JSON, or begins with a line of one."""
    try:
        text = read_text(file)
        first = _object(text.partition("\n")[0]) or _object(text)
    except ValueError:
        return False
    if any(keys <= first.keys() for keys in _KEYS):
        return True
    return bool(first) and all(
        isinstance(run, dict) and run.keys() >= _RUN for run in first.values()
    )


def _object(text: str) -> dict[str, Any]:
    """The object in JSON that a text is; empty if it is none."""
    try:
        value = parse_json(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
