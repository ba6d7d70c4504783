"""A cloze set from held-out books, in the manner of LAMBADA (Paperno et al., 2016): a model
completes the last word of a passage.

A passage is several sentences in a row. Its last word has four letters or more, occurs earlier in
the passage, is not among the commonest words of the books, and may be a name. Passages do not
overlap.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

COMMONEST = 200
"""Number of the books' commonest words that are never asked for."""

_OPEN, _CLOSE = "\"'(\u201c\u2018", "\"')\u201d\u2019"
"""Quotation marks (straight and curled) and brackets that open and close a sentence."""
_END = re.compile(rf"[.!?]+[{_CLOSE}]*\s+(?=[{_OPEN}]?[A-Z])")
_TITLES = ("Mr", "Mrs", "Ms", "Dr", "St", "Prof", "Rev", "Hon", "Capt", "Col", "Gen")
_LAST = re.compile(rf"\b([A-Za-z]{{4,}})[.!?]+[{_CLOSE}]*$")
_WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class Book:
    """A held-out book in sentences."""

    name: str
    sentences: list[str]


def sentences(text: str) -> list[str]:
    """The sentences of a Markdown text, without line breaks. Headings, lists, tables, quotations
    and rules are left out."""
    found = []
    for part in re.split(r"\n\s*\n", text):
        part = " ".join(part.split())
        if not part or part[0] in "#-*|>":
            continue
        cuts = [0]
        for match in _END.finditer(part):
            before = part[cuts[-1] : match.start()].rsplit(None, 1)
            word = before[-1] if before else ""
            # An initial or a title ends no sentence.
            if word.lstrip(_OPEN) not in _TITLES and len(word) > 1:
                cuts.append(match.end())
        found += [part[a:b].strip() for a, b in pairwise([*cuts, len(part)])]
    return [sentence for sentence in found if sentence]


def common_words(books: list[Book]) -> frozenset[str]:
    """The commonest words of the books, in lower case."""
    counts: Counter[str] = Counter()
    for book in books:
        for sentence in book.sentences:
            counts.update(word.lower() for word in _WORD.findall(sentence))
    # A small text excludes fewer words, so that words to ask for are left.
    return frozenset(word for word, _ in counts.most_common(min(COMMONEST, len(counts) // 20)))


def passages(book: Book, shortest: int, longest: int, common: frozenset[str]) -> Iterator[dict]:
    """Items {name, context, continuation} of a book, whose contexts have `shortest` to `longest`
    words; words of `common` are not asked for."""
    free = 0  # the first sentence that is in no passage yet
    for i, sentence in enumerate(book.sentences):
        match = _LAST.search(sentence)
        if match is None or match[1].lower() in common:
            continue
        first = i
        parts = [sentence[: match.start()].rstrip()]
        count = len(parts[0].split())
        while count < shortest and first > free:
            first -= 1
            parts.insert(0, book.sentences[first])
            count += len(parts[0].split())
        context = " ".join(filter(None, parts))
        if shortest <= count <= longest and match[1] in _WORD.findall(context):
            free = i + 1
            yield {"name": book.name, "context": context, "continuation": f" {match[1]}"}


def cloze(books: list[Book], count: int, shortest: int, longest: int) -> list[dict]:
    """At most `count` items, chosen by the hash of their contexts, in the books' order.

    Args:
        shortest: fewest words of a context.
        longest: most words of a context.

    Raises:
        ValueError: the books have no such passage.
    """
    common = common_words(books)
    found = [item for book in books for item in passages(book, shortest, longest, common)]
    if not found:
        raise ValueError(
            "the held-out books have no passage whose last word came before; give more"
        )

    def place(i: int) -> str:
        return hashlib.sha256(found[i]["context"].encode()).hexdigest()

    return [found[i] for i in sorted(sorted(range(len(found)), key=place)[:count])]
