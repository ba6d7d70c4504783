"""Parquet files that are damaged, hostile or large: one line, and memory within bounds."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mlra.data.cli import main
from megatron_mlra.data.readers import read_batches
from megatron_mlra.data.sources import find_sources

BYTE = ("--tokenizer", "byte")


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, so names in messages are short."""
    monkeypatch.chdir(tmp_path)


def error_of(capsys, *argv: str) -> str:
    """The one line of a run that writes nothing."""
    before = sorted(os.listdir())
    assert main([*argv]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert captured.out == "" and sorted(os.listdir()) == before
    return captured.err


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
    error = error_of(capsys, *argv)
    assert "a.parquet:2: the record has more than 2 MB: raise --max-record-mb" in error
    assert main([*argv, "--on-error", "skip"]) == 0
    assert "2 documents" in capsys.readouterr().out
    assert main([*argv[:-1], "4", "--overwrite"]) == 0


def test_a_parquet_file_that_grows():
    """One cell of 30 MB that stands in 3,000 rows, and a row group of one cell: some KB each."""
    many = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), ["x" * 30_000_000])
    pq.write_table(
        pa.table({"text": many}), "a.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30
    )
    pq.write_table(pa.table({"text": ["x" * 90_000_000]}), "b.parquet", compression="zstd")
    assert max(Path(f"{name}.parquet").stat().st_size for name in "ab") < 200_000
    for name, most, said in (
        ("a", 250, "a.parquet:1: the record has more than 20 MB: raise --max-record-mb"),
        (
            "b",
            80,
            "b.parquet:1: row group 0 has 90 MB in 1 rows, more than 20 MB per row: raise --",
        ),
    ):
        argv = ["--input", f"{name}.parquet", "--output-prefix", "out", "--max-record-mb", "20"]
        code, error, memory = _most_memory(*argv, *BYTE)
        assert code == 1 and said in error and error.count("\n") == 1
        assert memory < most, f"{memory} MiB"


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
    assert said in error_of(capsys, "--input", "a.parquet", "--output-prefix", "out", *BYTE)


def test_a_parquet_page_of_many_records(capsys):
    options = {"compression": "zstd", "use_dictionary": False}
    pq.write_table(pa.table({"text": ["x" * 1_500_000] * 60}), "a.parquet", **options)
    argv = ["--input", "a.parquet", "--output-prefix", "out", *BYTE, "--max-record-mb", "2"]
    said = "a.parquet:1: row group 0 has a page of 90 MB, more than four of 2 MB and 64: raise"
    assert said in error_of(capsys, *argv)


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
    assert said in error_of(capsys, "--input", "a.parquet", "--output-prefix", "out", *BYTE)
