"""Build the ladder's text: real English, deduplicated, with whole books and packages held out.

    python examples/reproduce/corpus.py --books CLONE --packages FOLDER --out DATA

CLONE is a Git clone (bare or not) of the repository mlschmitt/classic-books-markdown; FOLDER is
the folder that get_packages.sh filled. Writes DATA/train.jsonl, DATA/{books,docs,dictionary}.jsonl
and DATA/corpus.json (counts and SHA-256 of each). With --fineweb N, the first N shards of
FineWeb-Edu replace books and packages, and a hundredth of their documents is the held-out set
`fineweb`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from corpus_sources import (
    HELD_OUT_PACKAGES,
    TRAINING_PACKAGES,
    Document,
    books,
    fetch_fineweb,
    fineweb,
    package,
)
from megatron_mlra.command_line.parser import OneLineParser, run

SHORTEST_PARAGRAPH = 80
"""Characters of the shortest paragraph that may occur only once in the corpus. Shorter paragraphs
are dialogue and headings, which repeat."""
SHORTEST_DOCUMENT = 200
"""Fewest characters of a document."""
NGRAM = 13
"""Words per n-gram; n-grams tell whether texts overlap."""
SAMPLED = 16
"""One n-gram in so many is remembered, to find near duplicates among training documents."""
HELD_OUT_BOOKS = 40
"""One book in so many is held out, chosen by the hash of its name."""
COMMON = frozenset({"the", "of", "and", "to", "a", "in", "is", "that", "for", "it"})
"""Words that English prose cannot do without."""
LEAST_COMMON = 0.06
"""Least share of the words `COMMON` in English prose."""

_WORD = re.compile(r"[^\W_]+")


def fingerprint(text: str) -> bytes:
    """Eight bytes, the same for paragraphs that differ only in case, spaces and punctuation."""
    letters = "".join(words_of(text))
    return hashlib.blake2b(letters.encode(), digest_size=8).digest()


def words_of(text: str) -> list[str]:
    """The text's words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


_word_ids: dict[str, int] = {}


def _word_id(word: str) -> int:
    found = _word_ids.get(word)
    if found is None:
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        found = _word_ids[word] = int.from_bytes(digest, "little")
    return found


def ngrams(words: list[str]) -> np.ndarray:
    """Hashes of all n-grams of `NGRAM` words, in order.

    Returns:
        [max(0, len(words) - NGRAM + 1)], uint64.
    """
    if len(words) < NGRAM:
        return np.empty(0, np.uint64)
    ids = np.fromiter(map(_word_id, words), np.uint64, len(words))
    total = np.zeros(len(ids) - NGRAM + 1, np.uint64)
    for i in range(NGRAM):
        total = total * np.uint64(0x9E3779B97F4A7C15) + ids[i : i + len(total)]
    return total ^ (total >> np.uint64(29))


def is_english(words: list[str]) -> bool:
    """Whether at least `LEAST_COMMON` of the words are in `COMMON`."""
    return bool(words) and sum(map(COMMON.__contains__, words)) >= LEAST_COMMON * len(words)


def held_out_book(name: str) -> bool:
    """Whether the book of this name is held out."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_BOOKS == 0


@dataclass
class Filter:
    """Removes repetitions from documents. Held-out sets come first, so that text which a held-out
    set shares with the training set is removed from the training set."""

    paragraphs: set[bytes] = field(default_factory=set)
    """Fingerprints of the paragraphs seen."""
    sampled: set[int] = field(default_factory=set)
    """Sampled n-grams of the documents admitted."""
    held_out: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """N-grams of the held-out sets, sorted."""
    removed: Counter = field(default_factory=Counter)
    """Reason -> number of characters removed."""

    def _drop(self, why: str, text: str) -> None:
        self.removed[why] += len(text)

    def admit(self, parts: list[str], english: bool = True) -> tuple[str, np.ndarray] | None:
        """Remove a document's repeated paragraphs.

        Args:
            parts: the document's paragraphs.
            english: refuse a document that is not English prose.

        Returns:
            the remaining text and its n-grams; None where the document is left out.
        """
        kept = []
        for part in parts:
            if len(part) >= SHORTEST_PARAGRAPH:
                mark = fingerprint(part)
                if mark in self.paragraphs:
                    self._drop("repeated paragraph", part)
                    continue
                self.paragraphs.add(mark)
            kept.append(part)
        text = "\n\n".join(kept)
        if len(text) < SHORTEST_DOCUMENT or len(text) < 0.2 * sum(map(len, parts)):
            return self._drop("remainder of a repeated or short document", text)
        words = words_of(text)
        if english and not is_english(words):
            return self._drop("not English prose", text)
        grams = ngrams(words)
        sample = grams[grams % np.uint64(SAMPLED) == 0].tolist()
        if len(sample) >= 8 and sum(g in self.sampled for g in sample) > len(sample) / 2:
            return self._drop("near duplicate", text)
        if len(self.held_out) and len(grams) and self.shared(grams).mean() > 0.1:
            return self._drop("overlaps a held-out set", text)
        self.sampled.update(sample)
        return text, grams

    def shared(self, grams: np.ndarray) -> np.ndarray:
        """Which n-grams occur in a held-out set: bool, of the shape of `grams`."""
        at = np.searchsorted(self.held_out, grams)
        return self.held_out[np.minimum(at, len(self.held_out) - 1)] == grams


def write(
    path: Path, documents: Iterable[tuple[str, list[str]]], seen: Filter, held_out: bool
) -> tuple[dict, list[np.ndarray]]:
    """Write the admitted documents as JSON lines.

    Returns:
        {documents, characters, sha256}; and per document its n-grams (`held_out`), or those of its
        n-grams that occur in a held-out set.
    """
    digest, count, characters, found = hashlib.sha256(), 0, 0, []
    aside = path.with_suffix(".partial")
    with open(aside, "wb") as out:
        for name, parts in documents:
            admitted = seen.admit(parts, english=not name.startswith("dict-"))
            if admitted is None:
                continue
            text, grams = admitted
            line = json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n"
            out.write(line.encode())
            digest.update(line.encode())
            count, characters = count + 1, characters + len(text)
            found.append(grams if held_out else grams[seen.shared(grams)])
    aside.replace(path)
    return {"documents": count, "characters": characters, "sha256": digest.hexdigest()}, found


def named(source: str, documents: Iterable[Document]) -> Iterator[Document]:
    """Documents named `source/name`."""
    for name, parts in documents:
        yield f"{source}/{name}", parts


def english_sets(args) -> tuple[dict[str, Iterator[Document]], Iterator[Document]]:
    """{held-out set: its documents}, and the training documents."""
    if args.fineweb or args.fineweb_files:
        files = args.fineweb_files or fetch_fineweb(args.out / "fineweb", args.fineweb)
        # Read twice: held-out sets are read to their end first, and shards do not fit in memory.
        held, rest = enumerate(fineweb(files)), enumerate(fineweb(files))
        return (
            {"fineweb": named("fineweb", (d for i, d in held if i % 100 == 0))},
            named("fineweb", (d for i, d in rest if i % 100)),
        )

    def packages(names: Iterable[str]) -> Iterator[Document]:
        for name in names:
            yield from named(name, package(args.packages, name, args.workers))

    held_out = {name: packages(members) for name, members in HELD_OUT_PACKAGES.items()}
    held_out["books"] = named("books", (b for b in books(args.books) if held_out_book(b[0])))
    training = named("books", (b for b in books(args.books) if not held_out_book(b[0])))
    return held_out, itertools.chain(training, packages(TRAINING_PACKAGES))


def build(args) -> dict:
    """Write all sets and corpus.json; returns the content of corpus.json.

    Raises:
        ValueError: a source is missing, or a set came out empty.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    seen, report = Filter(), {"sets": {}}
    held_out, training = english_sets(args)
    marks: dict[str, np.ndarray] = {}
    for name, documents in held_out.items():
        report["sets"][name], grams = write(args.out / f"{name}.jsonl", documents, seen, True)
        marks[name] = np.unique(np.concatenate(grams)) if grams else np.empty(0, np.uint64)
        print(f"{name}: {report['sets'][name]}", flush=True)
    seen.held_out = np.unique(np.concatenate(list(marks.values())))
    report["sets"]["train"], found = write(args.out / "train.jsonl", training, seen, False)
    empty = [name for name, made in report["sets"].items() if not made["documents"]]
    if empty:
        raise ValueError(f"no documents in {', '.join(empty)}; give more sources")
    shared = np.unique(np.concatenate(found))
    for name, grams in marks.items():
        common = len(np.intersect1d(grams, shared, assume_unique=True))
        report["sets"][name]["share_of_13_grams_in_train"] = round(common / len(grams), 5)
    report["removed_characters"] = dict(seen.removed)
    (args.out / "corpus.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = OneLineParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--books", type=Path, help="clone of mlschmitt/classic-books-markdown")
    parser.add_argument("--packages", type=Path, help="folder that get_packages.sh filled")
    parser.add_argument("--fineweb", type=int, metavar="N", help="download N shards of FineWeb-Edu")
    parser.add_argument("--fineweb-files", type=Path, nargs="+", help="parquet files already here")
    parser.add_argument("--out", type=Path, required=True, help="folder for the text")
    parser.add_argument("--workers", type=int, default=2, help="processes that read pages")
    args = parser.parse_args()
    if not (args.fineweb or args.fineweb_files) and not (args.books and args.packages):
        parser.error("give --books CLONE and --packages FOLDER, or --fineweb N")
    for flag in ("books", "packages"):
        folder = getattr(args, flag)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{flag} {folder} is no folder")
    try:
        report = build(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    run(main)
