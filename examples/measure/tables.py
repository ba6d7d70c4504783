"""Rewrite the tables of README and docs from the newest result files.

    python examples/measure/tables.py
    python examples/measure/tables.py --check

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, above a caption of GPU,
versions, commit, day, file and command. speed_tables.py, serving_tables.py and
kernel_tables.py make the tables.
"""

from __future__ import annotations

import re
from pathlib import Path

import kernel_tables  # noqa: F401  its tables are in TABLES then
import serving_tables  # noqa: F401
import speed_tables  # noqa: F401
from measured import ROOT, TABLES
from megatron_mlra.command_line.parser import OneLineParser, run, write_text

START, END = "<!-- table: {} -->", "<!-- end of table -->"
BLOCK = re.compile(rf"{START.format(r'(\S+)')}\n(.*?){END}", re.DOTALL)


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that may have tables."""
    folders = ("", "docs/**/", "kernels/**/")
    return sorted(page for folder in folders for page in root.glob(f"{folder}*.md"))


def renewed(page: Path) -> str:
    """The text of a page with its tables made anew.

    Raises:
        ValueError: a table is unknown, has no end or no result; names page and table.
    """
    text = page.read_text()

    def new(block: re.Match[str]) -> str:
        name = block[1]
        if name not in TABLES:
            raise ValueError(f"{page}: no table {name}; there are {', '.join(sorted(TABLES))}")
        try:
            made = TABLES[name]().text(page)
        except (ValueError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
            # The last four come of results that lack records, or have them of another form.
            raise ValueError(f"{page}: table {name}: {type(error).__name__} {error}") from None
        return f"{START.format(name)}\n{made}\n{END}"

    starts, ends = len(re.findall(START.format(r"\S+"), text)), text.count(END)
    if len(BLOCK.findall(text)) != starts or starts != ends:
        raise ValueError(f"{page}: {starts} tables begin and {ends} end ({END})")
    return BLOCK.sub(new, text)


def main() -> int:
    """Run the command line; returns the exit code: 1 where --check finds another table."""
    flags = OneLineParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--check", action="store_true", help="write nothing, name what differs")
    args = flags.parse_args()
    stale = []
    try:
        for page in pages():
            if (text := renewed(page)) != page.read_text():
                stale.append(page)
                if not args.check:
                    write_text(page, text)
                what = "stale" if args.check else "renewed; read the text beside the tables"
                print(f"{page.relative_to(ROOT)}: {what}")
    except (ValueError, OSError) as error:
        flags.error(str(error))
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    run(main)
