"""Write miniature sources for the rehearsal: the texts of Python's `help()` in place of the books
and packages that corpus.py reads.

    python examples/reproduce/rehearsal/sources.py FOLDER

Writes FOLDER/books (a Git repository) and FOLDER/packages.
"""

from __future__ import annotations

import gzip
import html
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).parents[1]))

from corpus import held_out_book
from corpus_sources import HELD_OUT_PACKAGES, TRAINING_PACKAGES
from megatron_mlra.command_line.parser import OneLineParser, run


def write_package(folder: Path, name: str, title: str, text: str) -> None:
    """Write one topic of `help()` in the format of the package `name`."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "botocore":
        told = json.dumps({"documentation": "".join(f"<p>{p}</p>" for p in text.split("\n\n"))})
        with zipfile.ZipFile(folder / "botocore-0.whl", "w") as wheel:
            wheel.writestr("botocore/data/x/1/service-2.json.gz", gzip.compress(told.encode()))
    elif name.startswith("dict-"):
        (folder / "x.dict.dz").write_bytes(gzip.compress(text.encode()))
    elif name == "linux-doc-6.1":
        (folder / f"{title}.rst.gz").write_bytes(gzip.compress(text.encode()))
    elif name in ("perl-doc", "git-doc", "python3.11-doc"):
        suffix = ".pod" if name == "perl-doc" else ".txt"
        (folder / f"{title}{suffix}").write_text(text)
    else:
        body = "".join(f"<p>{html.escape(part)}</p>" for part in text.split("\n\n"))
        folder = folder / "html" / "en-US"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{title}.html").write_text(f"<html><nav>menu</nav><body>{body}</body></html>")


def main() -> int:
    """Write the sources; returns the exit code."""
    parser = OneLineParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    packages = [*TRAINING_PACKAGES, *(name for some in HELD_OUT_PACKAGES.values() for name in some)]
    # Only the longest topics have enough text for a document. Every topic is used once.
    longest = sorted(topics, key=lambda name: (-len(topics[name]), name))
    for package, title in zip(packages, longest[: len(packages)], strict=True):
        write_package(folder / "packages" / package, package, title, topics[title])
    books = folder / "books"
    held_out = next(f"Anyone/{n}" for n in range(1000) if held_out_book(f"Anyone/{n}"))
    # Several topics make one book, so that words occur again, as the cloze set needs.
    rest = longest[len(packages) :]
    texts = {held_out: "\n\n".join(topics[title] for title in rest[:8])}
    texts |= {f"Someone/{title}": topics[title] for title in rest[8:]}
    for name, text in texts.items():
        (books / name).parent.mkdir(parents=True, exist_ok=True)
        (books / f"{name}.md").write_text(text)
    identity = ("-c", "user.name=rehearsal", "-c", "user.email=rehearsal@localhost")
    for command in (("init", "-q"), ("add", "-A"), (*identity, "commit", "-qm", "Books")):
        subprocess.run(["git", "-C", str(books), *command], check=True)
    return 0


if __name__ == "__main__":
    run(main)
