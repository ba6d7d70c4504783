"""Preprocessing that must fail: one clear line, the right exit code, nothing left behind."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer, models

from megatron_mlra.data.cli import main
from support import ROOT

GOOD = b'{"text": "good"}\n'
BYTE = ("--tokenizer", "byte")


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, so names in messages are short."""
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_bytes(GOOD)


def error_of(capsys, code: int, *argv: str) -> str:
    """Runs, checks the exit code, the one line, and that no file appeared; returns the line."""
    before = sorted(os.listdir())
    try:
        returned = main(list(argv))
    except SystemExit as exit:  # of argparse
        returned = exit.code
    captured = capsys.readouterr()
    assert returned == code, captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert captured.out == ""
    assert sorted(os.listdir()) == before
    return captured.err


def make_inputs() -> None:
    Path("empty.jsonl").touch()
    Path("blank.jsonl").write_text("\n \n")
    Path("folder").mkdir()
    Path("texts").mkdir()
    Path("texts/b.txt.gz").touch()
    Path("texts/a.md").touch()
    Path("notes.md").write_text("x")
    Path("table.parquet.gz").write_bytes(b"x")
    Path("fake.parquet").write_text("not parquet")
    pq.write_table(pa.table({"n": [1], "text": [2]}), "numbers.parquet")
    os.mkfifo("pipe.jsonl")
    Path("bad.json.d").mkdir()
    Path("bad_tokenizer.json").write_text("{}")
    Path("no_eod.json").write_text(Tokenizer(models.BPE({"a": 0}, [])).to_str())
    Path("short.tiktoken").write_text("YQ== 0\n")
    Path("broken.tiktoken").write_text("YQ== 0\nYg==\n")
    Path("twice.tiktoken").write_text("YQ== 0\nYg== 0\n")
    shard("good.bin", [1, 50256])


def shard(name: str, tokens, magic=20240520, version=1, count=None) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    Path(name).write_bytes(header.tobytes() + np.array(tokens, dtype="<u2").tobytes())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--output-prefix out --tokenizer byte", "the following arguments are required: --input"),
        ("--input missing.jsonl --tokenizer byte", "missing.jsonl: No such file"),
        ("--input no*.jsonl --tokenizer byte", "no file matches no*.jsonl"),
        ("--input folder --tokenizer byte", "folder is a folder: name its files, such as folder/*"),
        ("--input texts --tokenizer byte", "name its files, such as texts/*.txt.gz"),
        ("--input notes.md --tokenizer byte", "notes.md has an unknown suffix: use .txt, .jsonl"),
        ("--input table.parquet.gz --tokenizer byte", "unknown suffix"),
        ("--input pipe.jsonl --tokenizer byte", "pipe.jsonl is not a regular file"),
        ("--input empty.jsonl --tokenizer byte", "empty.jsonl is empty (0 bytes)"),
        ("--input blank.jsonl --tokenizer byte", "no documents found in 1 input files"),
        ("--input good.jsonl ./good.jsonl --tokenizer byte", "named twice"),
        ("--input good.jsonl good.bin --tokenizer byte", "cannot be mixed"),
        ("--input good.jsonl", "text needs --tokenizer byte, hf or tiktoken"),
        ("--input good.jsonl --tokenizer word", "invalid choice: 'word'"),
        ("--input good.jsonl --tokenizer byte --workers 0", "--workers 0: use 1 or more"),
        ("--input good.jsonl --tokenizer byte --workers 1025", "--workers 1025: use at most 1024"),
        ("--input good.jsonl --tokenizer byte --workers two", "invalid int value: 'two'"),
        ("--input good.jsonl --tokenizer byte --on-error ignore", "invalid choice: 'ignore'"),
        ("--input good.jsonl --tokenizer byte --vocab-size 9", "--vocab-size is for token shards"),
        ("--input good.jsonl --tokenizer byte --eod-id 9", "do not apply to byte"),
        ("--input good.jsonl --tokenizer byte --eod-token x", "--eod-token is for the hf"),
        ("--input good.jsonl --tokenizer byte --tokenizer-model x", "takes no --tokenizer-model"),
        ("--input good.jsonl --tokenizer hf", "the hf tokenizer needs a --tokenizer-model"),
        ("--input good.jsonl --tokenizer hf --tokenizer-model nowhere", "nowhere does not exist"),
        (
            "--input good.jsonl --tokenizer hf --tokenizer-model folder",
            "folder/tokenizer.json",
        ),
        ("--input good.jsonl --tokenizer hf --tokenizer-model bad_tokenizer.json", "is not a tok"),
        ("--input good.jsonl --tokenizer hf --tokenizer-model no_eod.json", "pass --eod-token"),
        (
            "--input good.jsonl --tokenizer hf --tokenizer-model no_eod.json",
            'write {"eos_token": ...} into tokenizer_config.json beside it',
        ),
        (
            "--input good.jsonl --tokenizer hf --tokenizer-model no_eod.json --eod-token <e>",
            "'<e>' is not in no_eod.json",
        ),
        ("--input good.jsonl --tokenizer tiktoken --tokenizer-model gpt9", "no tiktoken encoding"),
        (
            "--input good.jsonl --tokenizer tiktoken --tokenizer-model x.tiktoken",
            "x.tiktoken does not exist",
        ),
        (
            "--input good.jsonl --tokenizer tiktoken --tokenizer-model short.tiktoken",
            "lacks 255 of the 256 single bytes",
        ),
        (
            "--input good.jsonl --tokenizer tiktoken --tokenizer-model broken.tiktoken",
            "broken.tiktoken:2: not `base64-token rank`",
        ),
        (
            "--input good.jsonl --tokenizer tiktoken --tokenizer-model twice.tiktoken",
            "gives two tokens one rank",
        ),
        ("--input fake.parquet --tokenizer byte", "fake.parquet is not a parquet file"),
        ("--input numbers.parquet --tokenizer byte", "column 'text' is int64, not string"),
        (
            "--input numbers.parquet --tokenizer byte --parquet-column body",
            "has no column 'body': it has n, text",
        ),
        ("--input good.bin --tokenizer byte", "tokenised already: leave out --tokenizer"),
        ("--input good.bin --eod-id 70000", "--eod-id 70000 is no uint16"),
        ("--input good.bin --vocab-size 9", "--vocab-size 9 does not hold --eod-id 50256"),
        (
            "--input good.jsonl --tokenizer byte --output-prefix /proc/absent/out",
            "/proc/absent cannot be made",
        ),
        ("--input good.jsonl --tokenizer byte --output-prefix folder/", "names a folder"),
        ("--input good.jsonl --tokenizer byte --output-prefix out.bin", "leave out the suffix"),
        ("--input good.jsonl --tokenizer byte --output-prefix bad", "bad.json is a folder"),
        (
            "--input good.jsonl --tokenizer byte --output-prefix /proc/out",
            "the folder /proc cannot be written",
        ),
        ("--input good.bin --output-prefix good --overwrite", "would replace the input good.bin"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    make_inputs()
    Path("bad.json.d").rename("bad.json")
    argv = arguments.split()
    if "--output-prefix" not in argv:
        argv += ["--output-prefix", "out"]
    assert message in error_of(capsys, 2, *argv)


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("pyarrow", "--input a.parquet --tokenizer byte"),
        ("zstandard", "--input a.jsonl.zst --tokenizer byte"),
        ("tokenizers", "--input good.jsonl --tokenizer hf --tokenizer-model t.json"),
        ("tiktoken", "--input good.jsonl --tokenizer tiktoken --tokenizer-model gpt2"),
    ],
)
def test_missing_package(capsys, monkeypatch, package, arguments):
    for name in ("a.parquet", "a.jsonl.zst", "t.json"):
        Path(name).write_bytes(b"x")
    for name in [package, *sys.modules]:
        if name.split(".")[0] == package:
            monkeypatch.setitem(
                sys.modules, name, None
            )  # import fails as where it is not installed
    line = error_of(capsys, 2, *arguments.split(), "--output-prefix", "out")
    assert f"run `pip install {package}`" in line


def test_failed_download_asks_for_a_ranks_file(capsys, monkeypatch):
    import tiktoken

    def no_network(name):
        raise ConnectionError("Max retries exceeded\nwith a second line")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    argv = ["--input", "good.jsonl", "--output-prefix", "out", "--tokenizer", "tiktoken"]
    line = error_of(capsys, 2, *argv, "--tokenizer-model", "gpt2")
    assert "could not download the encoding 'gpt2' (ConnectionError)" in line
    assert "pass a local ranks file" in line


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"magic": 20240801},
            "s.bin is not a token shard: found magic 20240801, expected 2024",
        ),
        ({"version": 7}, "s.bin is not a token shard: found version 7, expected 1"),
        ({"count": 5}, "s.bin is truncated or damaged: found 3 tokens, expected 5"),
        ({"count": 2}, "s.bin is truncated or damaged: found 3 tokens, expected 2"),
    ],
)
def test_wrong_shard(capsys, keywords, message):
    shard("first.bin", [1, 50256])
    shard("s.bin", [1, 2, 50256], **keywords)
    assert message in error_of(capsys, 2, "--input", "first.bin", "s.bin", "--output-prefix", "out")


def test_shard_shorter_than_its_header_or_without_tokens(capsys):
    Path("s.bin").write_bytes(b"abc")
    line = error_of(capsys, 2, "--input", "s.bin", "--output-prefix", "out")
    assert "s.bin is truncated: found 3 bytes, expected 1024 or more" in line
    shard("s.bin", [])
    assert "is empty" in error_of(capsys, 2, "--input", "s.bin", "--output-prefix", "out")


def test_shard_tokens_that_do_not_fit(capsys):
    shard("s.bin", [1, 50256, 60000])
    line = error_of(capsys, 1, "--input", "s.bin", "--output-prefix", "out")
    assert "token 60000 at position 2 is outside the vocabulary of 50257" in line
    line = error_of(capsys, 1, "--input", "s.bin", "--output-prefix", "out", "--eod-id", "65000")
    assert "s.bin holds no token 65000" in line


BAD_LINES = [
    (b'{"text": "cut', "invalid JSON (Unterminated string starting at: column 10)"),
    (b'["text"]', "not a JSON object but list"),
    (b'{"txet": "x"}', "no key 'text'"),
    (b'{"text": null}', "the value of 'text' is NoneType, not a string"),
    (b'{"text": "\xff"}', "invalid UTF-8 (byte 0xff at offset 10)"),
    (b'{"text": "\\ud800"}', "the text holds a lone surrogate, \\ud800"),
    (b'{"text": "x", "deep": ' + b"[" * 100_000, "invalid JSON (more than 100 levels of brackets"),
    (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "invalid JSON (Exceeds the limit (4300 digits)"),
]
HINTS = [
    (b'{"txet": "x"}', "no key 'text' but 'txet' (--json-key names another)"),
    (b'{"a\\n": 1, "b": 1, "c": 1, "d": 1}', "no key 'text' but 'a\\n', 'b', 'c' and 1 more (--j"),
    (b'{"' + b"k" * 99 + b'": 1}', f"no key 'text' but '{'k' * 40}'... (--json-key names another)"),
    (b"{}", "no key 'text' and no other"),
    (b"[", "invalid JSON (Expecting value: column 2; an object must lie on one line, without a l"),
    (
        b'[{"text": "x"},',
        "invalid JSON (Expecting value: column 16; an object must lie on one line",
    ),
    (b"{", "invalid JSON (Expecting property name enclosed in double quotes: column 2; an object "),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES + HINTS)
def test_bad_line_stops_the_run(capsys, line, reason):
    Path("a.jsonl").write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    error = error_of(capsys, 1, "--input", "a.jsonl", "--output-prefix", "out", *BYTE)
    assert f"error: a.jsonl:3: {reason}" in error


def test_bad_lines_are_skipped_reported_and_counted(capsys):
    bad = [line for line, _ in BAD_LINES]
    Path("a.jsonl").write_bytes(GOOD + b"\n".join(bad) + b"\n" + GOOD)
    Path("b.txt").write_bytes(b"one\ntwo \xe9")
    Path("c.txt").touch()
    argv = ["--input", "a.jsonl", "b.txt", "c.txt", "--output-prefix", "out", *BYTE]
    assert main([*argv, "--on-error", "skip"]) == 0
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    expected = [f"skipped a.jsonl:{i}: {reason}" for i, (_, reason) in enumerate(BAD_LINES, 2)]
    expected.append("skipped b.txt: invalid UTF-8 (line 2, byte 0xe9 at offset 8)")
    expected.append("skipped c.txt: the file is empty (0 bytes)")
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))
    assert "2 documents" in captured.out and "10 bad records left out" in captured.out
    metadata = json.loads(Path("out.json").read_text())
    assert [source["bad_records"] for source in metadata["sources"]] == [8, 1, 1]
    assert metadata["tokens"] == 2 * len("good.")


def test_bad_parquet_cells(capsys):
    cells = pa.array([b"ok", None, b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": cells}), "a.parquet")
    argv = ["--input", "a.parquet", "--output-prefix", "out", *BYTE]
    assert "a.parquet:2: the cell is null" in error_of(capsys, 1, *argv)
    assert main([*argv, "--on-error", "skip"]) == 0
    assert "a.parquet:3: invalid UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".zst", zstandard.ZstdCompressor(write_checksum=True).compress)],
)
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_compression(capsys, suffix, compress, damage):
    random = np.random.default_rng(0).integers(97, 123, 400_000, dtype=np.uint8).tobytes()
    lines = b"".join(b'{"text": "%s"}\n' % random[i : i + 100] for i in range(0, len(random), 100))
    data = bytearray(compress(lines))
    if damage == "cut":
        del data[-1000:]
    else:
        data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    Path(f"a.jsonl{suffix}").write_bytes(data)
    argv = ["--input", f"a.jsonl{suffix}", "--output-prefix", "out", *BYTE]
    line = error_of(capsys, 1, *argv)
    assert re.search(rf"a\.jsonl\{suffix}:\d+: ", line)


def test_existing_output_is_kept_unless_overwriting(capsys):
    argv = ["--input", "good.jsonl", "--output-prefix", "out", *BYTE]
    assert main(argv) == 0
    capsys.readouterr()
    first = Path("out.bin").read_bytes()
    Path("good.jsonl").write_bytes(b'{"text": "other"}\n')
    assert "out.bin exists: pass --overwrite" in error_of(capsys, 2, *argv)
    assert Path("out.bin").read_bytes() == first
    assert main([*argv, "--overwrite"]) == 0
    assert bytes(Path("out.bin").read_bytes()[::2])[:-1] == b"other"


def test_preprocess_imports_neither_torch_nor_megatron():
    code = "import megatron_mlra.data.cli, sys; print({'torch', 'megatron'} & {*sys.modules})"
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"


def test_a_document_of_token_shards_beyond_the_bound(capsys):
    shard("a.bin", [1, 50256, *[7] * 3_000_000])
    argv = ["--input", "a.bin", "--output-prefix", "out", "--max-record-mb", "4"]
    assert "a.bin: a document has more than 4 MB: raise --max-record-mb" in error_of(
        capsys, 1, *argv
    )
    assert main([*argv[:-1], "7"]) == 0
