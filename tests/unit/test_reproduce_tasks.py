"""examples/reproduce: the tasks made from held-out books have the answers that they claim."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from cloze import Book, cloze, common_words, sentences
from corpus import Filter, write
from long_context import TASKS, Maker, long_context
from make_tasks import read_books


def tokens(text: str) -> int:
    """Words and marks, in place of a tokenizer."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def book(name: str, seed: int, count: int = 400) -> Book:
    """Sentences of drawn words."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("bcdfgaeiou", k=draw.randrange(3, 9))) for _ in range(300)]
    made = [" ".join(draw.choices(words, k=draw.randrange(4, 14))) for _ in range(count)]
    return Book(name, [f"{text.capitalize()}." for text in made])


@pytest.mark.parametrize("mark", ["\u2028", "\u0085"])
def test_books_are_read_as_corpus_writes_them(tmp_path, mark):
    """corpus.py leaves characters in its lines at which `str.splitlines` would cut."""
    name = tmp_path / "books.jsonl"
    write(name, [("one", [f"The end of a line.{mark}It is of the text. " * 20])], Filter(), True)
    (only,) = read_books(name)
    assert only.name == "one" and len(only.sentences) == 40


def test_sentences_end_where_a_reader_says():
    text = (
        "# Title: X\n\n---\n\nMr. J. Smith came in. \"Who is it?\" asked Mrs.\nJones, sitting. 'I!'"
        " He sat . . . then went\u2019 on.\n\n* * *\n\nIt cost 3.50 pounds! \u201cDear.\u201d Yes"
    )
    assert sentences(text) == [
        "Mr. J. Smith came in.",
        '"Who is it?" asked Mrs. Jones, sitting.',
        "'I!'",
        "He sat . . . then went\u2019 on.",
        "It cost 3.50 pounds!",
        "\u201cDear.\u201d",
        "Yes",
    ]


def test_cloze_words_come_before_and_passages_do_not_overlap():
    books = [book("one", 1), book("two", 2)]
    items = cloze(books, 10**6, 20, 40)
    common = common_words(books)
    assert len(items) > 10
    for item in items:
        word = item["continuation"][1:]
        assert item["continuation"] == f" {word}" and len(word) >= 4
        assert word in re.findall(r"[A-Za-z]+", item["context"]) and word.lower() not in common
        assert 20 <= len(item["context"].split()) <= 40 and not item["context"].endswith(" ")
    for each in books:
        text, at = " ".join(each.sentences), 0
        for item in (i for i in items if i["name"] == each.name):
            at = text.index(item["context"] + item["continuation"], at) + len(item["context"])
    few = cloze(books, 7, 20, 40)
    assert len(few) == 7 and few == [item for item in items if item in few]
    assert few == cloze(books, 7, 20, 40)


def test_names_may_be_asked_for():
    lines = ["Now Heathcliff was there again.", "They all asked for Heathcliff!"]
    filler = book("x", 3).sentences
    (item, *_) = cloze([Book("b", [*lines, *filler])], 50, 5, 30)
    assert item["continuation"] == " Heathcliff"
    with pytest.raises(ValueError, match="no passage whose last word came before"):
        cloze([Book("b", ["Short."])], 5, 5, 30)


def answered(task: str, context: str) -> str:
    """The answer, found in the text by reading it."""
    body, question = context, context.rsplit(". ", 1)[-1]
    if task == "passkey":
        return re.search(r"The pass key is (\d+)\. Remember it: \1 is the pass key", body)[1]
    if task in ("single_needle", "multi_needle"):
        thing = re.search(r"of the (\w+) is$", question)[1]
        return re.search(rf"The secret number of the {thing} is (\d+)\.", body)[1]
    if task == "multi_value":
        thing, told = re.search(r"of the (\w+) are (.*) and$", question).groups()
        found = re.findall(rf"One of the secret numbers of the {thing} is (\d+)\.", body)
        (left,) = set(found) - set(told.split(", "))
        assert len(found) == 4
        return left
    if task == "variable_tracking":
        name = re.search(r"VAR (\w) is$", question)[1]
        at = {n: body.index(f"VAR {n} = ") for n in re.findall(r"VAR (\w) = ", body)}
        while not name.isdigit():
            value = re.search(rf"VAR {name} = (?:VAR )?(\w+)\.", body)[1]
            assert value.isdigit() or at[value] < at[name]
            name = value
        return name
    words = Counter(body.rpartition(". The word that")[0].split(", "))
    (first, most), (_, second) = words.most_common(2)
    assert most > second
    return first


@pytest.mark.parametrize("length", [300, 1000])
def test_long_contexts_hold_their_answers(length):
    maker = Maker([book("one", 1), book("two", 2)], tokens)
    items = list(long_context(maker, length, 6, seed=5))
    assert Counter(item["group"] for item in items) == dict.fromkeys(TASKS, 6)
    assert items == list(long_context(maker, length, 6, seed=5))
    other = list(long_context(maker, length, 6, seed=6))
    assert not any(a == b for a, b in zip(items, other, strict=True))
    depths = []
    for item in items:
        task, right = item["group"], item["choices"][item["answer"]]
        assert right == f" {answered(task, item['context'])}"
        assert len(set(item["choices"])) == 4 and len({tokens(c) for c in item["choices"]}) == 1
        assert length * 0.85 < tokens(item["context"] + right) <= length
        for other in item["choices"]:
            if other != right:
                there = other.strip() in re.findall(r"\w+", item["context"])
                assert there == (task not in ("passkey", "single_needle"))
        if task == "passkey":
            place = item["context"].index("The pass key is")
            depths.append(place / len(item["context"]))
    # A sixth of the text apart, but for sentences' lengths.
    assert depths == sorted(depths) and depths[0] < 0.25 and depths[-1] > 0.7
    assert len({item["answer"] for item in items}) == 4


def test_a_length_too_short_is_named():
    maker = Maker([book("one", 1)], tokens)
    with pytest.raises(ValueError, match=r"60 tokens are too few for variable_tracking, which"):
        maker.item("variable_tracking", 60, random.Random(1), 0.5)
    with pytest.raises(ValueError, match="12 tokens are too few for common_words"):
        maker.item("common_words", 12, random.Random(1), 0.5)
