"""Local tasks: items in JSON lines, and a model's accuracy on them.

An item is {context, choices, answer} (is the right choice the likeliest?), {context, continuation}
(would greedy decoding write the continuation?), or an item of ARC in its authors' format,
{question, answerKey, ...}. Items with a `group` also get results per group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron_mlra.command_line.foreign_text import parse_json
from megatron_mlra.command_line.parser import lines_of

Item = dict[str, Any]


class ArcItem(dict):
    """An item of ARC: each of its choices is a space and the choice's text."""


def read_task(file: str) -> list[Item]:
    """The items of a task, one JSON object per line.

    Raises:
        ValueError: names the file, the line and the fault.
    """
    items = []
    for number, line in enumerate(lines_of(file), 1):
        if not line.strip():
            continue
        try:
            item = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: not JSON ({error})") from None
        if isinstance(item, dict) and "answerKey" in item:
            item = _of_arc(item)
        problem = _problem(item)
        if problem:
            raise ValueError(f"{file}:{number}: {problem}")
        items.append(item)
    if not items:
        raise ValueError(f"{file} holds no items")
    if len({"choices" in item for item in items}) > 1:
        raise ValueError(f"{file} holds items with and without choices; make two files of them")
    return items


def _of_arc(item: Item) -> Item | None:
    """An item of ARC with the prompt of lm-evaluation-harness; the choices may be beside the
    question or inside it. None if the item has another form."""
    question, choices = item.get("question"), item.get("choices")
    if isinstance(question, dict):
        question, choices = question.get("stem"), question.get("choices")
    if isinstance(choices, dict):
        texts, labels = choices.get("text"), choices.get("label")
    elif isinstance(choices, list) and all(isinstance(each, dict) for each in choices):
        texts = [each.get("text") for each in choices]
        labels = [each.get("label") for each in choices]
    else:
        return None
    if not (isinstance(question, str) and isinstance(texts, list) and isinstance(labels, list)):
        return None
    if item["answerKey"] not in labels or len(texts) != len(labels):
        return None
    asked = {
        "context": f"Question: {question}\nAnswer:",
        "choices": [f" {text}" if isinstance(text, str) and text else "" for text in texts],
        "answer": labels.index(item["answerKey"]),
    }
    return ArcItem(asked)


def _problem(item: Any) -> str | None:
    if item is None:
        return "an item of ARC is a question, choices of text and label, and answerKey, a label"
    if not isinstance(item, dict) or not isinstance(item.get("context"), str):
        return "an item is an object with a context"
    if not isinstance(item.get("group", ""), str):
        return f"group is {item['group']!r:.100}; it is a text"
    if "choices" not in item:
        fine = isinstance(item.get("continuation"), str) and item["continuation"]
        return None if fine else "an item needs choices and answer, or a continuation"
    choices, answer = item["choices"], item.get("answer")
    if (
        not isinstance(choices, list)
        or not choices
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        return "choices is a list of texts"
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        return f"answer is {answer!r}; it is an index of choices, from 0"
    return None


def run_task(scorer: Any, items: list[Item]) -> dict[str, Any]:
    """A model's results on all items, and under `groups` those of each group.

    With choices: `acc`, the fraction of items whose right choice has the largest log-likelihood,
    and `acc_norm`, the same by log-likelihood per character of its text. For all items, on the
    right answers: `greedy`, the fraction that greedy decoding would write; `log_likelihood`, the
    mean; `perplexity`, exp(-mean); `cut`, the number that lost tokens on the left.
    """
    pairs = [(item["context"], text) for item in items for text in _texts(item)]
    scores = iter(scorer.continuations(pairs))
    answered = [(item, [next(scores) for _ in _texts(item)]) for item in items]
    found = _summary(answered)
    groups = dict.fromkeys(item.get("group") for item in items)
    if groups.keys() != {None}:
        found["groups"] = {
            group: _summary([pair for pair in answered if pair[0].get("group") == group])
            for group in groups
            if group is not None
        }
    return found


def _texts(item: Item) -> list[str]:
    return item["choices"] if "choices" in item else [item["continuation"]]


def _summary(answered: Sequence[tuple[Item, list[Any]]]) -> dict[str, Any]:
    found: dict[str, Any] = {"items": len(answered)}
    if "choices" in answered[0][0]:
        right = {"acc": 0, "acc_norm": 0}
        for item, scores in answered:
            values = [score.log_likelihood for score in scores]
            # The space in front of ARC's choices is not of their text.
            sizes = [len(choice) - isinstance(item, ArcItem) for choice in item["choices"]]
            shares = [value / size for value, size in zip(values, sizes, strict=True)]
            right["acc"] += values.index(max(values)) == item["answer"]
            right["acc_norm"] += shares.index(max(shares)) == item["answer"]
        found |= {name: count / len(answered) for name, count in right.items()}
    best = [scores[item.get("answer", 0)] for item, scores in answered]
    mean = sum(score.log_likelihood for score in best) / len(best)
    return found | {
        "greedy": sum(score.is_greedy for score in best) / len(best),
        "log_likelihood": mean,
        "perplexity": math.exp(min(-mean, 700.0)),
        "cut": sum(score.was_cut for score in best),
    }


def told(file: str, found: dict[str, Any]) -> list[str]:
    """Lines on the results of a task and of its groups."""
    lines = [f"{file}: {_numbers(found)}"]
    lines += [f"  {name}: {_numbers(each)}" for name, each in found.get("groups", {}).items()]
    if found["cut"]:
        lines.append(
            f"{found['cut']} of {found['items']} items are longer than the model takes and lost"
            " tokens on their left; --max-length says how many it takes"
        )
    return lines


def _numbers(found: dict[str, Any]) -> str:
    names = ("acc", "acc_norm", "greedy", "log_likelihood", "perplexity")
    values = [f"{name} {found[name]:.4f}" for name in names if name in found]
    return ", ".join([*values, f"{found['items']} items"])
