"""What all command lines share of their errors."""

from __future__ import annotations

import ast
import errno
import io
import subprocess
import sys
from argparse import Namespace

import pytest

from megatron_mlra.command_line import parser
from megatron_mlra.command_line.parser import LONGEST, OneLineParser, one_line, say, written_whole
from megatron_mlra.evaluation.inputs import read_inputs
from megatron_mlra.launch import control
from support import ENV, ROOT


def test_an_error_is_one_line_of_bounded_length():
    assert one_line(ValueError("a\nb\r\n  c")) == "a b c"
    assert one_line("x" * LONGEST) == "x" * LONGEST
    line = one_line("size is " + "9" * 10**6 + "; use at most 4")
    assert len(line) <= LONGEST and line.startswith("size is 99") and line.endswith("use at most 4")
    assert "99,555 letters" not in line and "letters left out" in line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\x00\x07b", r"a\x00\x07b"),
        ("a\u202eb", r"a\u202eb"),
        ("a\udcffb", r"a\udcffb"),
        ("Größe 10 µs", "Größe 10 µs"),
    ],
)
def test_no_text_of_a_stranger_commands_the_terminal(text, shown, capfd, monkeypatch):
    assert one_line(text) == shown
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())
    say(f"{text}\nsecond line")
    assert sys.__stdout__.getvalue() == f"{shown}\nsecond line\n"
    control.say(f"{text}\n[of another host]")
    assert capfd.readouterr().err == f"{shown}\\n[of another host]\n"


def test_a_flag_of_megabytes(capsys):
    parser = OneLineParser()
    parser.add_argument("--size", type=int)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--size", "9x" * 10**5])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: argument --size: invalid int value")
    assert error.count("\n") == 1 and len(error) <= LONGEST + 10


def test_no_command_prints_an_error_past_the_bound():
    """Where a command that reads files prints an exception's text, `one_line` bounds it."""
    for path in sorted((ROOT / "megatron_mlra").rglob("cli.py")):
        if {"launch", "benchmarks"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant)):
                continue
            text = ast.unparse(node)
            if "error: {" in text:
                assert "one_line(" in text, f"{path}:{node.lineno}: {text}"


def test_processes_of_one_number_have_names_of_their_own(tmp_path):
    """In containers that share a folder, host and process may have one name and number."""
    code = (
        "import os, sys; from megatron_mlra.command_line import parser; os.getpid = lambda: 7;"
        "print(parser.own_name(sys.argv[1]))"
    )
    names = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "x")],
            capture_output=True, text=True, check=True, env=ENV, timeout=60,
        ).stdout
        for _ in range(2)
    }  # fmt: skip
    assert len(names) == 2


def test_a_full_disk_is_named_and_left_clean(tmp_path):
    old = tmp_path / "old"
    old.write_text("old")
    full = pytest.raises(OSError, match=r"No space left on device: .*/old")
    with full as raised, written_whole(old) as partial:
        partial.symlink_to("/dev/full")
        partial.write_text("new")
    assert raised.value.errno == errno.ENOSPC
    assert [each.name for each in tmp_path.iterdir()] == ["old"]


def test_a_text_without_an_end_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(parser, "TEXT_BYTES", 2_000_000)
    with pytest.raises(ValueError, match=r"^/dev/zero has more than 2 MB; give a part of it$"):
        parser.read_text("/dev/zero")
    (tmp_path / "text").write_bytes("a\r\n\u00e9".encode())
    assert parser.read_text(tmp_path / "text") == "a\n\u00e9"


def test_a_mark_of_the_byte_order_is_no_part_of_a_text(tmp_path):
    """Editors of Windows write one; `mlra preprocess` leaves it out of documents too."""
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbf{}\r\n\xef\xbb\xbf")
    assert parser.lines_of(tmp_path / "text") == ["{}", "\ufeff"]


def test_a_text_that_is_scored_keeps_its_ends_of_lines(tmp_path):
    """`mlra preprocess` trains on a file's characters as they are, \\r\\n and a lone \\r too."""
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert parser.read_text(tmp_path / "text", newline="") == "a\r\nb\rc\n"
    args = Namespace(text=[str(tmp_path / "text")], data=[], verify=False)
    assert [*read_inputs(args)[0].values()] == ["a\r\nb\rc\n"]
