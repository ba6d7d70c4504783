"""Local tasks: what is read, and what is counted."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from megatron_mlra.evaluation import scoring
from megatron_mlra.evaluation.scoring import Score, Scorer
from megatron_mlra.evaluation.tasks import read_task, run_task, told
from megatron_mlra.inference import flags

STEM = {"stem": "2 + 2?", "choices": [{"text": "4", "label": "A"}, {"text": "5", "label": "B"}]}


def scorer(max_length: int = 16, shared=None) -> Scorer:
    """A model of bytes that says of the next one: the last one's successor, with 3/4."""

    def logits(tokens: torch.Tensor, last: int) -> torch.Tensor:
        shares = torch.full((*tokens.shape, 256), 0.25 / 255)
        shares.scatter_(-1, (tokens[..., None] + 1) % 256, 0.75)
        return shares.log()[:, -last:]

    return Scorer(logits, lambda text: list(text.encode()), 0, max_length, 3, shared=shared)


def write(folder, *items) -> str:
    file = folder / "task.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(file)


def test_answers_are_counted_by_group(tmp_path):
    items = read_task(
        write(
            tmp_path,
            {"context": "xa", "choices": ["cc", "bc"], "answer": 1, "group": "short"},
            {"context": "a", "choices": ["b", "cd"], "answer": 1, "group": "short"},
            {"context": "0123456789abcdefgh", "choices": ["ij"], "answer": 0, "group": "long"},
        )
    )
    found = run_task(scorer(), items)
    assert {name: each["items"] for name, each in found["groups"].items()} == {
        "short": 2,
        "long": 1,
    }
    assert (found["acc"], found["greedy"], found["cut"]) == (2 / 3, 2 / 3, 1)
    short, long = found["groups"]["short"], found["groups"]["long"]
    assert (short["acc"], short["greedy"], short["cut"], long["cut"]) == (0.5, 0.5, 0, 1)
    # 'ij' and 'bc' follow with 3/4 each letter; of 'cd' behind 'a', the d alone does.
    likely, unlikely = math.log(0.75), math.log(0.25 / 255)
    assert long["log_likelihood"] == pytest.approx(2 * likely, abs=1e-5)
    assert short["log_likelihood"] == pytest.approx((3 * likely + unlikely) / 2, abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(-found["log_likelihood"]))
    lines = told("t.jsonl", found)
    assert lines[0].startswith("t.jsonl: acc 0.6667") and lines[1].startswith("  short: acc 0.5000")
    assert lines[-1].startswith("1 of 3 items are longer than the model takes")


def test_choices_behind_one_context_read_it_once(monkeypatch):
    monkeypatch.setattr(scoring, "SHARED", 8)
    long = "0123456789abcdefgh"
    pairs = [(long, "ij"), (long, "kl"), (long + " ", "ij"), ("short", "ij"), ("short", "k")]
    pairs += [(long, each) for each in ("i", "ijklm", "x", "y")]
    expected = scorer(40).continuations(pairs)
    calls = []

    def shared(first, rows, last):
        calls.append((first.shape[1], *rows.shape, last))
        return scorer(40).logits(torch.cat([first.expand(len(rows), -1), rows], 1), last)

    one = scorer(40, shared)
    assert one.continuations(pairs) == expected
    # Three choices of 1 to 3 bytes behind 18 bytes, the last of which predicts; then three and one.
    assert calls == [(17, 3, 3, 3), (17, 3, 5, 5), (17, 1, 1, 1)]
    cut = scorer(20, shared).continuations([(long, "ij"), (long, "ijklmn")])
    assert [score.was_cut for score in cut] == [False, True] and len(calls) == 3


def test_a_line_ends_at_its_end_alone(tmp_path):
    """JSON allows inside a string what Python's `splitlines` cuts at."""
    file = tmp_path / "task.jsonl"
    item = {"context": "a\u2028b\x85c", "continuation": "d\u2029"}
    line = json.dumps(item, ensure_ascii=False)
    file.write_bytes(f"{line}\r\n\n{line}".encode())
    assert [found["context"] for found in read_task(str(file))] == [item["context"]] * 2
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\n")
    args = flags.parser().parse_args(["run", "--prompt-file", str(prompts)])
    assert flags.read_prompts(args) == ["a\u2028b"]


def test_words_are_scored_without_choices(tmp_path):
    items = read_task(write(tmp_path, *({"context": "a", "continuation": c} for c in ("b", "c"))))
    found = run_task(scorer(), items)
    mean = (math.log(0.75) + math.log(0.25 / 255)) / 2
    assert found["greedy"] == 0.5 and "acc" not in found and "groups" not in found
    assert found["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-5)


def test_items_of_arc_are_read_in_both_forms(tmp_path):
    flat = {"question": "2 + 2?", "choices": {"text": ["4", "5"], "label": ["1", "2"]}}
    items = read_task(
        write(tmp_path, {"question": STEM, "answerKey": "A"}, {**flat, "answerKey": "1"})
    )
    wanted = {"context": "Question: 2 + 2?\nAnswer:", "choices": [" 4", " 5"], "answer": 0}
    assert items == [wanted, wanted]


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"question": STEM, "answerKey": "E"}, "an item of ARC is a question, choices"),
        ({"question": STEM, "answerKey": {}}, "an item of ARC is a question, choices"),
        ({"question": 1, "choices": {"text": 1, "label": []}, "answerKey": "A"}, "an item of ARC"),
        ({"context": "a", "continuation": "b", "group": 7}, "group is 7; it is a text"),
        ([1], "an item is an object with a context"),
    ],
)
def test_wrong_items_are_named(tmp_path, item, said):
    file = write(tmp_path, {"context": "a", "continuation": "b"}, item)
    with pytest.raises(ValueError, match=f"task.jsonl:2: {said}"):
        read_task(file)


def test_characters_of_arcs_choices_are_counted_as_the_harness_counts_them(tmp_path):
    """lm-evaluation-harness puts a space in front of a choice, and does not count it."""
    item = {"question": "Which?", "choices": {"text": ["a", "bb"], "label": ["A", "B"]}}
    found = [Score(-1.0, False, 1), Score(-1.9, False, 1)]  # -1 and -0.95 nats a character
    fixed = SimpleNamespace(continuations=lambda pairs: found)
    results = run_task(fixed, read_task(write(tmp_path, {**item, "answerKey": "B"})))
    assert (results["acc"], results["acc_norm"]) == (0.0, 1.0)
    # Choices that are given with their spaces are taken as they are.
    given = {"context": "Which?", "choices": [" a", " bb"], "answer": 1}
    assert run_task(fixed, read_task(write(tmp_path, given)))["acc_norm"] == 0.0
