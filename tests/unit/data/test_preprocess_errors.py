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
from megatron_mlra.data.readers import read_batches
from megatron_mlra.data.sources import find_sources
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
        ("--input folder --tokenizer byte", "folder is a folder"),
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
        ("--input good.jsonl --tokenizer byte --output-prefix /proc/out", "cannot write /proc/out"),
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


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
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


def test_two_parquet_columns_of_one_name(tmp_path, capsys):
    columns = [pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, ["text", "text"]), tmp_path / "a.parquet")
    argv = ["--input", str(tmp_path / "a.parquet"), "--output-prefix", str(tmp_path / "out")]
    assert main([*argv, "--tokenizer", "byte"]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {tmp_path}/a.parquet has 2 columns 'text'; rename one\n"


def _most_memory(*argv: str, addresses: int = 1 << 40) -> tuple[int, str, int]:
    """Exit code, errors and MiB of memory, beyond those of a run that is refused at once.

    Args:
        addresses: bytes that there are beyond those of an idle process.
    """
    script = (
        "import resource, sys, pyarrow.parquet, numpy, tqdm\n"
        "from megatron_mlra.data.cli import main\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "before = peak()\n"
        "idle = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (idle + {addresses},) * 2)\n"
        "code = main(sys.argv[1:])\n"
        "print(peak() - before)\n"
        "sys.exit(code)\n"
    )
    command = [sys.executable, "-c", script, *argv]
    env = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # others reserve addresses ahead
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    return done.returncode, done.stderr, int(done.stdout.split()[-1])


def test_cells_beyond_the_bound(capsys):
    large = "x" * 3_000_000
    pq.write_table(pa.table({"text": ["a", large, "b"], "n": [1, 2, 3]}), "a.parquet")
    argv = ["--input", "a.parquet", "--output-prefix", "out", *BYTE, "--max-record-mb", "2"]
    error = error_of(capsys, 1, *argv)
    assert "a.parquet:2: the record has more than 2 MB: raise --max-record-mb" in error
    assert main([*argv, "--on-error", "skip"]) == 0
    assert "2 documents" in capsys.readouterr().out
    assert main([*argv[:-1], "4", "--overwrite"]) == 0


def test_a_parquet_file_that_grows(capsys):
    """One cell of 30 MB that stands in 3,000 rows, and a row group of one cell: some KB each."""
    many = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), ["x" * 30_000_000])
    pq.write_table(
        pa.table({"text": many}), "a.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30
    )
    pq.write_table(pa.table({"text": ["x" * 400_000_000]}), "b.parquet", compression="zstd")
    assert max(Path(f"{name}.parquet").stat().st_size for name in "ab") < 200_000
    for name, said in (
        ("a", "a.parquet:1: the record has more than 20 MB: raise --max-record-mb"),
        ("b", "b.parquet:1: row group 0 has 400 MB in 1 rows, more than 20 MB per row: raise --"),
    ):
        argv = ["--input", f"{name}.parquet", "--output-prefix", "out", "--max-record-mb", "20"]
        code, error, memory = _most_memory(*argv, *BYTE)
        assert code == 1 and said in error and error.count("\n") == 1
        assert memory < 250, f"{memory} MiB"


def test_a_parquet_page_that_says_another_size():
    """128 MiB in place of 1.2 MB: one line, whether there is that much memory or not."""
    table = pa.table({"text": ["a" * 1_200_000]})
    pq.write_table(table, "a.parquet", use_dictionary=False, write_statistics=False)
    at = pq.ParquetFile("a.parquet").metadata.row_group(0).column(0).data_page_offset
    data = bytearray(Path("a.parquet").read_bytes())
    # The page's type, and behind it the size: Thrift's numbers of 7 bits a byte.
    assert data[at : at + 3] == b"\x15\x00\x15" and data[at + 6] < 128 <= data[at + 5]
    data[at + 3 : at + 7] = b"\xfe\xff\xff\x7f"
    Path("a.parquet").write_bytes(data)
    argv = ["--input", "a.parquet", "--output-prefix", "out", *BYTE]
    for addresses, said in ((1 << 40, "expected: 134217727"), (100 << 20, "alloc")):
        code, error, memory = _most_memory(*argv, addresses=addresses)
        assert code == 1 and "a.parquet:1: " in error and said in error, error
        assert error.count("\n") == 1 and memory < 100, error
    assert not list(Path().glob("out*"))


def _varint(number: int, length: int = 0) -> bytes:
    """Thrift's number of 7 bits a byte, of a `length` that may be longer than it needs."""
    rest = bytes([number * 2 >> shift & 127 | 128 for shift in range(0, 70, 7)])
    length = length or max(1, -(-(2 * number).bit_length() // 7))
    return rest[: length - 1] + bytes([rest[length - 1] & 127])


def _replace_in_footer(name: str, before: int, after: int, behind: bytes) -> None:
    """Replace a number that has these bytes behind it."""
    data = Path(name).read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    old = b"\x16" + _varint(before) + behind  # an int64, in the field behind the one before
    assert data.count(old, footer) >= 1
    new = b"\x16" + _varint(after, len(_varint(before))) + behind
    Path(name).write_bytes(data[:footer] + data[footer:].replace(old, new))


def test_a_parquet_footer_that_says_other_sizes(capsys):
    """48 MB of records, one at a time, whatever the footer says of them and behind many nulls."""
    texts = [None] * 500 + [str(number) * 400_000 for number in range(10, 70)]
    options = {"compression": "zstd", "use_dictionary": False, "write_batch_size": 1}
    pq.write_table(pa.table({"text": texts}), "a.parquet", data_page_size=1000, **options)
    column = pq.ParquetFile("a.parquet").metadata.row_group(0).column(0)
    _replace_in_footer("a.parquet", column.total_uncompressed_size, 1000, b"\x16")
    (source,) = find_sources(["a.parquet"])
    found, most, idle = [], 0, pa.total_allocated_bytes()
    for batch in read_batches(0, source, split_lines=False, parquet_column="text"):
        found += batch.documents
        most = max(most, pa.total_allocated_bytes() - idle)
    assert [text and text.decode() for text in found] == texts
    assert most < 10_000_000
    _replace_in_footer("a.parquet", column.total_compressed_size, 8191, b"\x26")
    said = "a.parquet:1: a column from byte 4 to 8,195 of a file of "
    assert said in error_of(capsys, 1, "--input", "a.parquet", "--output-prefix", "out", *BYTE)


def test_a_parquet_page_of_many_records(capsys):
    options = {"compression": "zstd", "use_dictionary": False}
    pq.write_table(pa.table({"text": ["x" * 1_500_000] * 60}), "a.parquet", **options)
    argv = ["--input", "a.parquet", "--output-prefix", "out", *BYTE, "--max-record-mb", "2"]
    said = "a.parquet:1: row group 0 has a page of 90 MB, more than four of 2 MB and 64: raise"
    assert said in error_of(capsys, 1, *argv)


@pytest.mark.parametrize(
    ("begin", "end", "header", "said"),
    [
        (0, 1, b"\x1b", "a page's header is none"),  # a kind that it has no fields of
        (0, 1, b"\x00", "is none"),
        (0, 1, b"\x19\xfc\xff\xff\xff\x0f", "a page's header"),  # a list of billions
        (5, 6, b"\xfe\xff\xff\x7f", "a page up to byte 134,2"),
    ],
)
def test_a_parquet_page_whose_header_is_none(begin, end, header, said, capsys):
    pq.write_table(pa.table({"text": ["a" * 50]}), "a.parquet", use_dictionary=False)
    at = pq.ParquetFile("a.parquet").metadata.row_group(0).column(0).data_page_offset
    whole = Path("a.parquet").read_bytes()
    Path("a.parquet").write_bytes(whole[: at + begin] + header + whole[at + end :])
    assert said in error_of(capsys, 1, "--input", "a.parquet", "--output-prefix", "out", *BYTE)


def test_a_document_of_token_shards_beyond_the_bound(capsys):
    shard("a.bin", [1, 50256, *[7] * 3_000_000])
    argv = ["--input", "a.bin", "--output-prefix", "out", "--max-record-mb", "4"]
    assert "a.bin: a document has more than 4 MB: raise --max-record-mb" in error_of(
        capsys, 1, *argv
    )
    assert main([*argv[:-1], "7"]) == 0
