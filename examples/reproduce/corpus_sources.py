"""Reads documents as paragraphs from a Git clone of books, unpacked packages, and parquet files.

Every reader yields `(name, paragraphs)` in an order that depends on file names alone.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import zipfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from multiprocessing import Pool
from pathlib import Path

Document = tuple[str, list[str]]
"""A name, unique in its source, and the text in paragraphs."""

HELD_OUT_PACKAGES = {
    "docs": ("postgresql-doc-15", "git-doc", "debian-policy", "developers-reference"),
    "dictionary": ("dict-foldoc", "dict-jargon"),
}
"""Held-out set -> the packages that make up the set; none of their text is trained on."""

TRAINING_PACKAGES = (
    "dict-gcide",
    "anarchism",
    "apache2-doc",
    "debian-handbook",
    "erlang-doc",
    "libreoffice-help-en-us",
    "linux-doc-6.1",
    "nodejs-doc",
    "octave-doc",
    "openjdk-17-doc",
    "perl-doc",
    "python-django-doc",
    "python-pandas-doc",
    "python-sqlalchemy-doc",
    "python3.11-doc",
    "qtbase5-doc-html",
    "racket-doc",
    "rust-doc",
    "sqlite3-doc",
    "vim-doc",
    "botocore",
)

_SUFFIXES = {
    "perl-doc": (".pod",),
    "linux-doc-6.1": (".rst.gz", ".txt.gz"),
    "python3.11-doc": (".txt",),
    "git-doc": (".txt",),
}
"""Package -> endings of the files that hold its text; for all other packages `.html`."""

_NOT_PROSE = re.compile(
    # Listings, source code and indexes; pages that repeat others (Rust's `core` repeats its
    # `std`); languages other than English.
    r"/class-use/|/index-files/|package-(tree|use|summary)\.html|/html/(src|core)/|/_modules/"
    r"|/implementors/|/arch/|/search|/RelNotes/"
    r"|/translations/|_[a-z]{2}\.pod|-handbook/html/(?!en-US)|/manual/(?!en/)"
)


def paragraphs(text: str) -> list[str]:
    """Text split at blank lines; a paragraph keeps its line breaks and indents."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return [part.strip("\n").rstrip() for part in re.split(r"\n[ \t]*\n", text) if part.strip()]


def books(clone: Path) -> Iterator[Document]:
    """The books of a Git clone (bare or not): the files `Author/Title.md` of HEAD.

    Files whose content is not in the clone (of a partial clone) are left out.

    Raises:
        ValueError: git cannot read the folder.
    """

    def git(*args: str, feed: bytes | None = None) -> bytes:
        done = subprocess.run(["git", "-C", str(clone), *args], input=feed, capture_output=True)
        if done.returncode:
            said = " ".join(done.stderr.decode(errors="replace").split())
            raise ValueError(
                f"{clone} is no Git clone with a commit ({said}); clone"
                " mlschmitt/classic-books-markdown there"
            )
        return done.stdout

    listed = git("ls-tree", "-r", "-z", "HEAD").decode().split("\0")[:-1]
    entries = [(line.split("\t", 1)[1], line.split()[2]) for line in listed]
    entries = sorted((name, blob) for name, blob in entries if "/" in name and name[-3:] == ".md")
    asked = "".join(f"{blob}\n" for _, blob in entries).encode()
    held = git("cat-file", "--batch-check", feed=asked).decode().splitlines()
    for (name, blob), answer in zip(entries, held, strict=True):
        if not answer.endswith(" missing"):
            yield name[:-3], paragraphs(git("cat-file", "blob", blob).decode("utf-8", "replace"))


def package(folder: Path, name: str, workers: int = 1) -> Iterator[Document]:
    """The documents of one unpacked package under `folder`.

    Raises:
        ValueError: the package is missing or holds no document; the line names the command that
            downloads packages.
    """
    root = folder / name
    if name == "botocore":
        readers = [_botocore(wheel) for wheel in sorted(root.glob("*.whl"))]
    elif name.startswith("dict-"):
        readers = [_dictionary(file) for file in sorted(root.rglob("*.dict.dz"))]
    else:
        readers = [_pages(root, _SUFFIXES.get(name, (".html",)), workers)]
    found = 0
    for document in (document for reader in readers for document in reader):
        found += 1
        yield document
    if not found:
        raise ValueError(
            f"{root}: no documents of {name} there; run examples/reproduce/get_packages.sh {folder}"
        )


def fineweb(files: Iterable[Path]) -> Iterator[Document]:
    """One document per row of parquet files: the column `text`."""
    import pyarrow.parquet as parquet

    for file in files:
        number = 0
        for batch in parquet.ParquetFile(file).iter_batches(1024, columns=["text"]):
            for text in batch.column(0).to_pylist():
                yield f"{file.name}:{number}", paragraphs(text)
                number += 1


def fetch_fineweb(folder: Path, shards: int) -> list[Path]:
    """Download the first `shards` files of FineWeb-Edu's 100B-token sample, and return their paths.
    Needs a network."""
    from huggingface_hub import HfApi, hf_hub_download

    repository = {"repo_id": "HuggingFaceFW/fineweb-edu", "repo_type": "dataset"}
    names = HfApi().list_repo_files(**repository)
    names = sorted(n for n in names if n.startswith("sample/100BT/") and n.endswith(".parquet"))
    return [
        Path(hf_hub_download(**repository, filename=name, local_dir=folder))
        for name in names[:shards]
    ]


def _pages(root: Path, suffixes: tuple[str, ...], workers: int) -> Iterator[Document]:
    files = sorted(
        path
        for path in root.rglob("*")
        if path.name.endswith(suffixes) and path.is_file() and not path.is_symlink()
    )
    files = [path for path in files if not _NOT_PROSE.search(str(path.relative_to(root)))]
    names = [str(path.relative_to(root)) for path in files]
    if workers == 1:
        yield from zip(names, map(_page, files), strict=True)
        return
    with Pool(workers) as pool:
        yield from zip(names, pool.imap(_page, files, chunksize=16), strict=True)


def _page(path: Path) -> list[str]:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    text = raw.decode("utf-8", "replace")
    return html_paragraphs(text) if path.suffix == ".html" else paragraphs(text)


_HIDDEN = "script style nav header footer head svg button noscript form select"
_INLINE = (
    "a abbr b bdi bdo big cite code data del dfn em font i ins kbd label mark q s samp small span"
    " strike strong sub sup time tt u var wbr"
)
_VOID = "area base br col embed hr img input link meta source track wbr"
HIDDEN, INLINE, VOID = (frozenset(words.split()) for words in (_HIDDEN, _INLINE, _VOID))
"""HTML tags: whose text is left out; which do not end a paragraph; which have no end tag."""


class _Text(HTMLParser):
    """Collects a page's paragraphs: the text between two tags that are not inline."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self.parts: list[str] = []
        self.hidden: list[str] = []
        self.pre = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if self.hidden:
            if tag == self.hidden[-1]:
                self.hidden.append(tag)
            return
        if tag in HIDDEN:
            self.flush()
            self.hidden.append(tag)
        elif tag == "br":
            self.parts.append("\n")
        elif tag not in INLINE:
            self.flush()
            self.pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self.hidden:
            if tag == self.hidden[-1]:
                self.hidden.pop()
        elif tag not in INLINE and tag not in VOID:
            self.flush()
            self.pre = max(0, self.pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))

    def flush(self) -> None:
        text = "".join(self.parts)
        self.parts = []
        lines = text.split("\n") if self.pre else [line.strip() for line in text.split("\n")]
        text = "\n".join(line.rstrip() for line in lines).strip("\n")
        if text.strip():
            self.found.append(text)


def html_paragraphs(page: str) -> list[str]:
    """The paragraphs of an HTML page, without menus and scripts."""
    reader = _Text()
    reader.feed(page)
    reader.close()
    reader.flush()
    return reader.found


_TAG_LINE = re.compile(r"^[ \t]*\[[^\[\]\n]{1,40}\][ \t]*\n", re.MULTILINE)


_PER_DOCUMENT = 100
"""Paragraphs of a dictionary that make one document."""


def _dictionary(file: Path) -> Iterator[Document]:
    """A dictd dictionary. Lines that hold only the name of an entry's source are left out."""
    text = gzip.decompress(file.read_bytes()).decode("utf-8", "replace")
    blocks = paragraphs(_TAG_LINE.sub("", text))
    for start in range(0, len(blocks), _PER_DOCUMENT):
        yield f"{file.stem}:{start}", blocks[start : start + _PER_DOCUMENT]


def _botocore(wheel: Path) -> Iterator[Document]:
    """The documentation strings of botocore's service descriptions, one document per service."""
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if re.search(r"/service-2\.json(\.gz)?$", n)]
        for name in sorted(names):
            raw = archive.read(name)
            described = json.loads(gzip.decompress(raw) if name.endswith(".gz") else raw)
            yield name, [p for page in _strings(described) for p in html_paragraphs(page)]


def _strings(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from _strings(value)
