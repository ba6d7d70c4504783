"""The command `mlra`: its commands, their help, the page of flags."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mlra.command_line import flags_page
from megatron_mlra.command_line.commands import COMMANDS, overview, there
from megatron_mlra.command_line.parser import HelpFormatter, OneLineParser, check_output
from megatron_mlra.training import flags
from support import ENV, ROOT
from support.programs import program

HERE = [name for name in there() if name not in flags_page.THEIRS]


def mlra(*argv: object) -> subprocess.CompletedProcess:
    command = [program("mlra"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=ENV)


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """A parser and those of its subcommands."""
    inner = flags_page.subcommands(parser).values()
    return [parser, *(found for sub in inner for found in parsers(sub))]


@pytest.mark.parametrize("name", there())
def test_bodies_can_be_called(name):
    assert callable(there()[name].body())


@pytest.mark.parametrize("name", HERE)
def test_help_fits_80_columns_and_explains_every_flag(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command = COMMANDS[name]
    monkeypatch.setattr(sys, "argv", ["mlra" if command.first else f"mlra {name}"])
    found = command.parser()
    if command.first:
        found = flags_page.subcommands(found)[command.first[0]]
    for parser in parsers(found):
        text = parser.format_help()
        assert text.startswith(f"usage: mlra {name}")
        assert max(map(len, text.splitlines())) <= 80, text
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), action
            if action.help is not argparse.SUPPRESS:
                missing = [option for option in action.option_strings if option not in text]
                assert not missing, f"{name}: {missing}"


def test_the_overview_needs_no_torch_and_little_time():
    before = os.times()
    done = mlra("--help")
    after = os.times()
    assert done.stdout == overview() + "\n" and not done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    spent = after.children_user - before.children_user + after.children_system
    assert spent - before.children_system < 0.5
    code = "import sys; from megatron_mlra.command_line import commands; commands.overview();"
    code += "print({'torch', 'numpy', 'megatron.core', 'yaml'} & {*sys.modules})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert said.stdout == "set()\n", said.stderr


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["plann"], "mlra has no command plann; did you mean plan?"),
        (["zzz"], "mlra has no command zzz; mlra --help lists the commands"),
        (["zz\udcff"], r"mlra has no command zz\udcff; mlra --help lists the commands"),
    ],
)
def test_an_unknown_command_is_one_line(argv, said):
    done = mlra(*argv)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {said}\n")


def test_no_command_lists_them():
    done = mlra()
    said = f"{overview()}\n\nerror: name a command\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_the_entrys_help_is_two_screens_and_its_script_the_same(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    said = {}
    for command in (
        [program("mlra"), "pretrain"],
        [sys.executable, ROOT / "pretrain_mlra.py"],
        [sys.executable, "-m", "megatron_mlra.training"],
    ):
        env = ENV | {"COLUMNS": "100"}
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, env=env)
        assert done.returncode == 0 and not done.stderr
        said[done.stdout.partition("\n\n")[2]] = done.stdout
    (text,) = said.values()
    lines = text.splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100
    assert "--help-megatron" in text and "--data-path" in text


def test_one_rank_answers(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert flags.answer(["--help"]) and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert flags.answer(["--x", "--config", "list"])
    assert capsys.readouterr().out.startswith("debug ")
    assert not flags.answer(["--config", "debug"]) and not flags.answer(["--config"])


def test_megatrons_help_is_printed_whole():
    """argparse takes a `%` in a help text for the start of a field."""
    from megatron.training.arguments import add_megatron_arguments

    parser = flags.add_mlra_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    bare = [a for a in parser._actions if a.help and re.search(r"%(?![(%])", a.help)]
    assert bare, "there was one; then this may go"
    with pytest.raises((KeyError, TypeError, ValueError)):
        parser.format_help()
    flags.repair_help(parser)
    text = " ".join(parser.format_help().split())
    for action in bare:
        assert " ".join(action.help.split()).replace("%%", "%") in text
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    assert len(shown) > 800
    assert all(option in text for action in shown for option in action.option_strings)


@pytest.mark.parametrize(
    ("text", "said"),
    [("50 % of", "50 % of"), ("90%, %(default)s", "90%, 7"), ("100%% %(x)s", "100% %(x)s")],
)
def test_a_percent_sign_stands_for_itself(text, said):
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--flag", default=7, help=text)
    if "(x)" in text:
        with pytest.raises(KeyError):
            parser.format_help()
    else:
        assert said in parser.format_help()


def test_every_parser_knows_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        OneLineParser().parse_args(["--version"])
    assert end.value.code == 0
    assert re.fullmatch(
        r"megatron-mlra \S+, megatron-core \S+, torch \S+\n", capsys.readouterr().out
    )


def test_the_page_of_flags_is_theirs():
    written = (ROOT / "docs" / "flags.md").read_text()
    assert written == flags_page.page().rstrip() + "\n", (
        "run python -m megatron_mlra.command_line.flags_page > docs/flags.md"
    )


def test_output_folders_are_made_or_refused_before_any_work(tmp_path):
    file = tmp_path / "new" / "folder" / "out.json"
    check_output(file, "--json")
    assert file.parent.is_dir()
    for wrong, said in (
        (tmp_path, f"--json {tmp_path} is a folder; name a file in it"),
        ("/dev/null", "--json /dev/null is no plain file; name another"),
        ("x" * 300, "cannot be written (File name too long)"),
        ("/proc/no/x", "--json /proc/no/x: the folder /proc/no cannot be made (No such file"),
        (file.parent / "x" / "y", "cannot be made ("),
    ):
        (file.parent / "x").touch()
        with pytest.raises(ValueError) as error:
            check_output(wrong, "--json")
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("evaluation.cli", "gone --text gone --json"),
        ("evaluation.analysis.cli", "gone --text gone --json"),
        ("evaluation.analysis.cli", "gone --text gone --plot"),
        ("benchmarks.losses", "a=gone --json"),
        ("benchmarks.losses", "a=gone --png"),
        ("benchmarks.decoding.cli", "--rehearse --json"),
        ("benchmarks.decoding.cli", "--rehearse --png"),
        ("planner.cli", "--config debug --gpus 8 --plot"),
        ("planner.twin_cli", "debug --attention gqa --output"),
        ("data.demo_cli", ""),
        ("data.cli", "--input {tmp_path}/in.txt --tokenizer byte --output-prefix"),
        ("inference.cli", "gone --prompt x --output"),
        ("fault_tolerance.soak", "--config debug --work"),
        ("checkpoint.cli", "reshard gone"),
        ("checkpoint.cli", "export-hf gone"),
    ],
)
@pytest.mark.parametrize("folder", ["/proc", "/proc/no", "{tmp_path}/in.txt", "{tmp_path}/full"])
def test_what_cannot_be_written_is_refused_before_all_else(
    module, argv, folder, tmp_path, capsys, request
):
    if folder.endswith("/full"):
        request.getfixturevalue("full_disk")
    (tmp_path / "in.txt").write_text("text")
    words = [*argv.split(), f"{folder}/out" + (".jsonl" if module == "data.demo_cli" else ".png")]
    main = importlib.import_module(f"megatron_mlra.{module}").main
    try:
        code = main([word.format(tmp_path=tmp_path) for word in words])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    line = code if isinstance(code, str) else said.err.rstrip("\n")
    assert code in (1, 2) or line is code
    assert line.startswith("error: ") and words[-1].format(tmp_path=tmp_path) in line
    assert re.search(r"cannot be (made|written)|is not a folder", line) and "\n" not in line


def test_an_interrupt_is_one_line():
    code = "from megatron_mlra.command_line.parser import run\ndef main():\n    print('half')\n"
    code += "    raise KeyboardInterrupt\nrun(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert (done.returncode, done.stdout) == (130, "half\n")
    assert done.stderr == "error: interrupted\n"


FIRST_MOMENTS = """
import runpy, signal, sys

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == "megatron_mlra.command_line.output":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
run, sys.argv = sys.argv[1], sys.argv[1:]
(runpy.run_path if run.endswith(".py") else runpy.run_module)(run, run_name="__main__")
"""
STARTS = [
    *(f"{ROOT}/tools/{file.name}" for file in sorted((ROOT / "tools").glob("*.py"))),
    f"{ROOT}/pretrain_mlra.py",
    *(f"megatron_mlra.{package}" for package in ("command_line", "training", "launch")),
]


@pytest.mark.parametrize("start", STARTS, ids=[Path(start).name for start in STARTS])
def test_a_ctrl_c_in_the_first_moments_is_one_line(start):
    command = [sys.executable, "-c", FIRST_MOMENTS, start, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        (">/dev/full", 1, "error: standard output: No space left on device\n"),
        (">&-", 0, ""),
    ],
)
def test_output_that_cannot_be_written(redirected, code, said):
    program = [sys.executable, "-m", "megatron_mlra.command_line", "presets"]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirected}', "sh", *program], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (code, said)
