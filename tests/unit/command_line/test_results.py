"""What a command writes replaces an earlier result of a command, and no other file."""

from __future__ import annotations

import json

import pytest

from megatron_mlra.command_line import early, figures
from megatron_mlra.command_line.commands import COMMANDS, there
from megatron_mlra.command_line.parser import OneLineParser, write_json
from megatron_mlra.command_line.results import check_figure, check_json

RUN = {"steps": [1], "losses": [2.0], "validation": None}
LINE = {"prompt": "a", "output": "b", "finish_reason": "length", "tokens": [1]}
RESULTS = {
    "evaluate": {"checkpoint": "a", "text": {}, "data": {}, "task": {}},
    "evaluate --cache-dtype": {"checkpoint": "a", "decoded": {}},
    "analyze": {"checkpoint": "a", "variant": "MLA", "layers": []},
    "benchmark-decoding": {"gpu": "a", "commit": "b", "records": []},
    "benchmark-training": {"device": "a", "matmul_tflops": 1, "rows": []},
    "compare-losses": {"a": RUN, "b": RUN},
}
OTHERS = {
    "config.json": json.dumps({"model_type": "mlra", "hidden_size": 64}, indent=2),
    "metadata": json.dumps({"tokenizer": "byte", "data": {}}),
    "a task": json.dumps({"context": "a", "choices": ["b"], "answer": 0}) + "\n",
    "prompts": json.dumps({"prompt": "a"}) + "\n",
    "nothing said": "{}",
    "runs and more": json.dumps({"a": RUN, "b": 1}),
    "a list": json.dumps([RESULTS["evaluate"]]),
    "a number": "1",
    "a text": "A book.\n",
    "other bytes": "\0\udcff",
    "deep": "[" * 10000,
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", RESULTS)
def test_an_earlier_result_is_replaced(name, indent, tmp_path):
    write_json(tmp_path / "a.json", RESULTS[name], indent)
    check_json(tmp_path / "a.json", "--json")


def test_lines_of_generate_and_an_empty_file_are_replaced(tmp_path):
    for text in ("", (json.dumps(LINE) + "\n") * 2):
        (tmp_path / "a.json").write_text(text)
        check_json(tmp_path / "a.json", "--output")
    (tmp_path / "a.png").touch()
    check_figure(tmp_path / "a.png", "--png")


@pytest.mark.parametrize("name", OTHERS)
def test_another_file_is_not_replaced(name, tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(OTHERS[name].encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as error:
        check_json(file, "--json")
    assert str(error.value) == (
        f"--json {file} is there and no result of a command, which alone is replaced; remove it,"
        " or name another file"
    )


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_a_figure_replaces_a_figure_alone(kind, tmp_path):
    file = tmp_path / f"a.{kind}"
    figure, _ = figures.sheet()
    figures.save(figure, file)
    check_figure(file, "--plot")
    file.write_bytes(file.read_bytes().replace(b"atplotlib", b"icrograph"))
    with pytest.raises(ValueError, match="is there and no figure of a command, which alone is"):
        check_figure(file, "--plot")
    with pytest.raises(ValueError, match="is there and no result of a command"):
        check_json(file, "--json")


def test_the_name_of_a_figure_says_its_kind(tmp_path):
    for name in ("a", "a.txt", "a.json"):
        with pytest.raises(
            ValueError, match=rf"--png \S+{name} ends in none of .png, .svg, .pdf; use"
        ):
            check_figure(tmp_path / name, "--png")


LEFT = {
    ("twin", "output"),
    ("demo-corpus", "output"),
    ("reshard", "destination"),
    ("convert", "destination"),
    ("soak", "work"),
    ("benchmark-training", "out"),
}
"""Outputs that replace nothing: --overwrite is asked for, or the place must be new; or a folder."""


@pytest.mark.parametrize("name", [n for n, command in there().items() if not command.program])
def test_each_file_for_output_is_guarded(name, tmp_path, monkeypatch):
    """Every output that is declared refuses a text that lies there."""
    monkeypatch.chdir(tmp_path)
    parser = COMMANDS[name].parser()
    for action in parser._actions:
        kind, check = getattr(action, "early", (None, None))
        if kind != early._OUTPUT or (name, action.dest) in LEFT:
            continue
        file = tmp_path / "book.png"
        file.write_text("A book.\n")
        with pytest.raises(ValueError, match="which alone is replaced"):
            check(file, early._name(action))


def test_two_outputs_are_two_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = OneLineParser()
    for name in ("--json", "--png"):
        early.writes(parser.add_argument(name), early.no_check)
    early.check(parser, ["--json", "a", "--png", "b"])
    with pytest.raises(ValueError, match=r"^--json and --png are both a; name two files$"):
        early.check(parser, ["--json", f"{tmp_path}/a", "--png", "a"])
