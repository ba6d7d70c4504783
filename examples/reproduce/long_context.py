"""Long-context tasks with known answers hidden in held-out books, in the manner of passkey
retrieval (Mohtashami and Jaggi, 2023) and RULER (Hsieh et al., 2024).

Every item has four choices with the same number of tokens, so that chance is a quarter. The
question is the beginning of the sentence that the answer ends: a base model continues it. Tasks:

passkey            one number, told twice; the wrong choices are not in the text
single_needle      one number of one thing; the wrong choices are not in the text
multi_needle       a number of each of four things; the wrong choices are the other things' numbers
multi_value        four numbers of one thing; the question tells three, the answer is the fourth;
                   the wrong choices are another thing's numbers
variable_tracking  four chains of three variables; the answer is the value of one chain's last
                   variable; the wrong choices are the other chains' values
common_words       a list of words; the answer is the most frequent; the wrong choices are in the
                   list too
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cloze import Book

CHOICES = 4
SLACK = 4
"""Tokens of an item left free: two sentences may take more tokens joined than apart."""
MOST_COMMON_SHARE = 0.1
"""Share of the answer in the list of common_words."""
THINGS = (
    *("anchor", "barrel", "bell", "bridge", "candle", "carpet", "castle", "chapel", "clock"),
    *("coach", "compass", "cottage", "drum", "engine", "farm", "ferry", "flag", "forge"),
    *("fountain", "gate", "harbour", "kettle", "ladder", "lantern", "library", "mill", "mirror"),
    *("museum", "orchard", "organ", "palace", "piano", "ship", "statue", "tower", "wagon"),
)

Needle = tuple[float, str]
"""Depth in the text, 0 (begin) to 1 (end), and the sentence to hide there."""


@dataclass
class Maker:
    """Makes items from some books.

    Args:
        books: held-out books.
        count: returns a text's number of tokens.
    """

    books: list[Book]
    count: Callable[[str], int]
    sizes: list[list[int]] = field(default_factory=list)
    """Tokens of each book's sentences."""
    words: list[str] = field(default_factory=list)
    """Words for common_words, by falling frequency in the books."""

    def __post_init__(self) -> None:
        self.sizes = [[self.count(f" {s}") for s in book.sentences] for book in self.books]
        counts: Counter[str] = Counter()
        for book in self.books:
            for sentence in book.sentences:
                counts.update(re.findall(r"\b[a-z]{4,9}\b", sentence))
        self.words = [word for word, _ in counts.most_common(3000)]

    def item(self, task: str, length: int, draw: random.Random, depth: float) -> dict:
        """One item of at most `length` tokens, its answer included.

        Args:
            draw: source of all random choices.
            depth: where the answer's sentence is hidden, 0 to 1; some tasks ignore it.

        Raises:
            ValueError: the length is too short for the task.
        """
        if task == "common_words":
            return self._common_words(length, draw)
        needles, question, answer, others = getattr(self, f"_{task}")(draw, depth)
        used = self.count(f"{question} {answer}") + sum(self.count(f" {t}") for _, t in needles)
        room = length - used - SLACK
        if room < 0:
            raise ValueError(
                f"{length} tokens are too few for {task}, which takes {used}; use more"
            )
        hay = self._hay(draw, room)
        while True:
            context = " ".join([*_hidden(hay, needles), question])
            if self.count(f"{context} {answer}") <= length:
                break
            hay.pop()
        return self._asked(task, context, answer, others, draw)

    def _hay(self, draw: random.Random, room: int) -> list[str]:
        """Consecutive sentences of at most `room` tokens, from a random place of a book drawn by
        its length; behind the book's last sentence comes its first."""
        which = draw.choices(range(len(self.books)), [len(b.sentences) for b in self.books])[0]
        book, sizes = self.books[which], self.sizes[which]
        at, found = draw.randrange(len(sizes)), []
        while room >= (size := sizes[at % len(sizes)]):
            found.append(book.sentences[at % len(sizes)])
            room, at = room - size, at + 1
        return found

    def _asked(
        self, task: str, context: str, answer: str, others: list[str], draw: random.Random
    ) -> dict:
        choices = [f" {text}" for text in (answer, *others)]
        draw.shuffle(choices)
        return {
            "context": context,
            "choices": choices,
            "answer": choices.index(f" {answer}"),
            "group": task,
        }

    def _numbers(self, draw: random.Random, count: int) -> list[str]:
        """Different numbers of five digits that have equally many tokens."""
        found: list[str] = []
        while len(found) < count:
            number = str(draw.randrange(10_000, 100_000))
            if number not in found and self._alike(number, found):
                found.append(number)
        return found

    def _alike(self, text: str, others: list[str]) -> bool:
        return not others or self.count(f" {text}") == self.count(f" {others[0]}")

    def _passkey(self, draw: random.Random, depth: float) -> tuple:
        key, *others = self._numbers(draw, CHOICES)
        needle = f"The pass key is {key}. Remember it: {key} is the pass key."
        return [(depth, needle)], "What is the pass key? The pass key is", key, others

    def _single_needle(self, draw: random.Random, depth: float) -> tuple:
        thing, (number, *others) = draw.choice(THINGS), self._numbers(draw, CHOICES)
        needle = f"The secret number of the {thing} is {number}."
        return [(depth, needle)], f"The secret number of the {thing} is", number, others

    def _multi_needle(self, draw: random.Random, depth: float) -> tuple:
        things, numbers = draw.sample(THINGS, CHOICES), self._numbers(draw, CHOICES)
        places = [depth, *(draw.random() for _ in range(CHOICES - 1))]
        needles = [
            (place, f"The secret number of the {thing} is {number}.")
            for place, thing, number in zip(places, things, numbers, strict=True)
        ]
        question = f"The secret number of the {things[0]} is"
        return needles, question, numbers[0], numbers[1:]

    def _multi_value(self, draw: random.Random, depth: float) -> tuple:
        things, numbers = draw.sample(THINGS, 2), self._numbers(draw, 2 * CHOICES - 1)
        owners = [things[0]] * CHOICES + [things[1]] * (CHOICES - 1)
        places = [depth, *(draw.random() for _ in owners[1:])]
        needles = [
            (place, f"One of the secret numbers of the {owner} is {number}.")
            for place, owner, number in zip(places, owners, numbers, strict=True)
        ]
        told = ", ".join(numbers[1:CHOICES])
        question = f"The secret numbers of the {things[0]} are {told} and"
        return needles, question, numbers[0], numbers[CHOICES:]

    def _variable_tracking(self, draw: random.Random, depth: float) -> tuple:
        del depth  # the assignments of a chain keep their order
        numbers = self._numbers(draw, CHOICES)
        letters = draw.sample("ABCDEFGHJKLMNOPQRSTUVWXYZ", 3 * CHOICES)
        needles = []
        for chain, number in enumerate(numbers):
            names = letters[3 * chain : 3 * chain + 3]
            values = (number, f"VAR {names[0]}", f"VAR {names[1]}")
            places = sorted(draw.random() for _ in names)
            needles += [
                (place, f"VAR {name} = {value}.")
                for place, name, value in zip(places, names, values, strict=True)
            ]
        return needles, f"The value of VAR {letters[2]} is", numbers[0], numbers[1:]

    def _common_words(self, length: int, draw: random.Random) -> dict:
        question = "The word that stands most often in this list is"
        answer = draw.choice(self.words)
        others = [w for w in self.words if w != answer and self._alike(w, [answer])]
        if len(others) < CHOICES:
            raise ValueError("the text has too few words for common_words; give more books")
        rest = [w for w in self.words if w != answer]
        size = length // 2
        while True:
            repeats = max(3, round(MOST_COMMON_SHARE * size))
            # Every word but the answer is twice in the list.
            pool = draw.sample(rest, min(len(rest), max(CHOICES - 1, (size - repeats) // 2)))
            pool[: CHOICES - 1] = picked = draw.sample(others, CHOICES - 1)
            pool = list(dict.fromkeys(pool))
            listed = pool * 2 + [answer] * repeats
            draw.shuffle(listed)
            context = f"{', '.join(listed)}. {question}"
            over = self.count(f"{context} {answer}") - length
            if over <= 0:
                return self._asked("common_words", context, answer, picked, draw)
            if size <= 2 * CHOICES:
                raise ValueError(f"{length} tokens are too few for common_words; use more")
            size = max(2 * CHOICES, min(size - 1, size * length // (length + over)))


def _hidden(hay: list[str], needles: list[Needle]) -> list[str]:
    """The sentences with the needles inserted at their depths."""
    found = list(hay)
    for depth, text in sorted(needles, reverse=True):
        found.insert(int(depth * (len(hay) + 1)), text)
    return found


TASKS = (
    *("passkey", "single_needle", "multi_needle", "multi_value"),
    *("variable_tracking", "common_words"),
)


def long_context(maker: Maker, length: int, count: int, seed: int) -> Iterator[dict]:
    """`count` items of each task of `length` tokens, with the answers at evenly spaced depths."""
    for task in TASKS:
        for i in range(count):
            draw = random.Random(f"{seed}/{task}/{length}/{i}")
            yield maker.item(task, length, draw, (i + 0.5) / count)
