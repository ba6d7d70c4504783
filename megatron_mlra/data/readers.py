"""Readers: input files to batches of undecoded documents, in order and in bounded memory.

The parent process reads and decompresses. The workers decode, parse and tokenise.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from megatron_mlra.data.errors import InputError, first_line, require
from megatron_mlra.data.parquet_pages import pages
from megatron_mlra.data.sources import Source

BATCH_BYTES = 1 << 20
RECORD_BYTES = 256_000_000
"""Default of the most bytes of one record."""
_PARQUET_ROWS = 64
_PAGE_BYTES = 64_000_000
"""Bytes of a parquet page beyond those of four records: pages hold a thousand small ones."""
_ZSTD_PIECE = 2048
"""Compressed bytes given to zstd at a time. 3 bytes expand to at most 128 KiB, all to 64 MiB."""


@dataclass(frozen=True)
class Batch:
    """Consecutive documents of one source."""

    source: int
    """Index of the source."""
    path: str
    parser: str
    """What a document is: json, a JSON line; text, a line of text; file, a whole text file; cell, a
    parquet cell."""
    first: int
    """Line or row number of the first document, from 1."""
    documents: list[bytes | int | None] = field(default_factory=list)
    """bytes: a document. None: a null cell. A number: the limit of bytes that a record exceeds,
    which is left unread."""
    consumed: int = 0
    """Bytes of the source read since the previous batch, for the progress bar."""
    failure: str | None = None
    """Why reading stopped after ``documents`` and before the end of the source."""


class ZstdReader(io.RawIOBase):
    """Decompressed bytes of a .zst file, which may have several frames.

    Raises:
        EOFError: while reading, if the last frame is cut off (the package's own stream reader ends
            there without an error).
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._zstd = require("zstandard", "reading .zst")
        self._file = file
        self._compressed = b""
        self._ready = memoryview(b"")
        self._frame: Any = None

    def readable(self) -> bool:
        """True: the stream is for reading only."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` with decompressed bytes; 0 at the end."""
        while not self._ready:
            self._compressed = self._compressed or self._file.read(_ZSTD_PIECE)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the zstd stream ends in the middle of a frame")
                return 0
            if self._frame is None:
                # Files written with --long need more than the default window.
                decompressor = self._zstd.ZstdDecompressor(max_window_size=1 << 31)
                self._frame = decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(self._compressed))
            self._compressed = b""
            if self._frame.eof:
                self._compressed = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def check_readers(sources: list[Source], parquet_column: str) -> None:
    """Check packages, and the schemas of parquet files.

    Raises:
        InputError: a package is missing, or a parquet file is damaged or lacks the column.
    """
    if any(source.compression == ".zst" for source in sources):
        require("zstandard", "reading .zst")
    for source in sources:
        if source.format == "parquet" and source.size:
            with _open_parquet(source.path) as file:
                _check_column(file, source.path, parquet_column)


def read_batches(
    index: int,
    source: Source,
    *,
    split_lines: bool,
    parquet_column: str,
    record_bytes: int = RECORD_BYTES,
) -> Iterator[Batch]:
    """Batches of about ``BATCH_BYTES`` of one source. If the source is damaged, the last batch says
    why in ``failure``.

    At most ``record_bytes`` decompressed bytes of a line or text file are in memory. A row group of
    a parquet file is not read if its declared size implies a cell of more than ``record_bytes``.
    """
    if source.size == 0:
        yield Batch(index, source.path, "file", 1, failure="the file is empty (0 bytes)")
    elif source.format == "parquet":
        yield from _read_parquet(index, source, parquet_column, record_bytes)
    elif source.format == "text" and not split_lines:
        yield _read_file(index, source, record_bytes)
    else:
        yield from _read_lines(index, source, record_bytes)


def _open(source: Source, raw: IO[bytes]) -> IO[bytes]:
    if source.compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if source.compression == ".zst":
        return io.BufferedReader(ZstdReader(raw), BATCH_BYTES)
    return raw


def _damage(source: Source) -> tuple[type[Exception], ...]:
    """The errors that reading a damaged file of this compression raises."""
    errors: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error)
    return (
        (*errors, require("zstandard", ".zst").ZstdError)
        if source.compression == ".zst"
        else errors
    )


def _read_file(index: int, source: Source, most: int) -> Batch:
    with open(source.path, "rb") as raw:
        try:
            data = _open(source, raw).read(most + 1)
        except _damage(source) as error:
            return Batch(index, source.path, "file", 1, [], source.size, first_line(error))
    if len(data) > most:
        return Batch(index, source.path, "file", 1, [most], source.size)
    return Batch(index, source.path, "file", 1, [data.removeprefix(b"\xef\xbb\xbf")], source.size)


def _read_lines(index: int, source: Source, most: int) -> Iterator[Batch]:
    parser = "json" if source.format == "jsonl" else "text"
    first, position, held, failure = 1, 0, 0, None
    lines: list[bytes | int | None] = []
    with open(source.path, "rb") as raw:
        file = _open(source, raw)
        while True:
            try:
                line = file.readline(most + 1)
                if len(line) > most:
                    end = line
                    while end and not end.endswith(b"\n"):
                        end = file.readline(BATCH_BYTES)
                    lines.append(most)
                    continue
            except _damage(source) as error:
                line, failure = b"", first_line(error)
            if line and first == 1 and not lines:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line:
                lines.append(line)
                held += len(line)
            if held >= BATCH_BYTES or not line:
                consumed = (raw.tell() if line else source.size) - position
                yield Batch(index, source.path, parser, first, lines, consumed, failure)
                if not line:
                    return
                first, position, held = first + len(lines), position + consumed, 0
                lines = []


def _open_parquet(path: str, column: str | None = None) -> Any:
    """The pyarrow.parquet.ParquetFile; `column` is read as a dictionary array.

    Raises:
        InputError: the file is not parquet.
    """
    parquet = require("pyarrow.parquet", "reading parquet")
    try:
        return parquet.ParquetFile(path, read_dictionary=[column] if column else None)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not a parquet file: {first_line(error)}") from error


def _check_column(file: Any, path: str, column: str) -> None:
    arrow = require("pyarrow", "reading parquet")
    schema = file.schema_arrow
    if column not in schema.names:
        raise InputError(f"{path} has no column {column!r}: it has {', '.join(schema.names)}")
    if schema.names.count(column) > 1:
        raise InputError(f"{path} has {schema.names.count(column)} columns {column!r}; rename one")
    kind = schema.field(column).type
    if arrow.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (arrow.string(), arrow.large_string(), arrow.string_view()):
        raise InputError(f"{path}: column {column!r} is {kind}, not string")


def _read_parquet(index: int, source: Source, column: str, most: int) -> Iterator[Batch]:
    first, position = 1, 0
    with (
        open(source.path, "rb") as raw,
        _open_parquet(source.path) as file,
        _open_parquet(source.path, column) as numbered,
    ):
        rows = file.metadata.num_rows
        for group in range(file.metadata.num_row_groups):
            batches = _group_cells((file, numbered), raw, group, column, most)
            while True:
                try:
                    cells = next(batches, None)
                # MemoryError: a damaged page may declare any size.
                except (ValueError, OSError, MemoryError) as error:
                    yield Batch(index, source.path, "cell", first, [], 0, first_line(error))
                    return
                if cells is None:
                    break
                end = source.size * (first - 1 + len(cells)) // rows
                yield Batch(index, source.path, "cell", first, cells, end - position)
                first, position = first + len(cells), end


def _group_cells(
    files: tuple[Any, Any], raw: IO[bytes], group: int, column: str, most: int
) -> Iterator[list[bytes | int | None]]:
    """Documents of a row group, about ``BATCH_BYTES`` at a time.

    Args:
        files: read as texts, and as numbers of distinct texts.

    Raises:
        ValueError, OSError: the group is damaged, has a page that is too large, or must hold a cell
            of more than ``most`` bytes.
    """
    arrow, compute = (require(name, "reading parquet") for name in ("pyarrow", "pyarrow.compute"))
    file, numbered = files
    described = file.metadata.row_group(group)
    parts = [described.column(i) for i in range(described.num_columns)]
    (part,) = (part for part in parts if part.path_in_schema == column)
    found = [*pages(raw, os.fstat(raw.fileno()).st_size, part)]
    size = sum(page.size for page in found)
    # A cell also takes some bytes for levels and lengths.
    if size > described.num_rows * (most + 64) + (1 << 20):
        raise ValueError(
            f"row group {group} has {size / 1e6:,.0f} MB in {described.num_rows:,} rows, more than"
            f" {most / 1e6:g} MB per row: raise --max-record-mb"
        )
    # A value that stands in many rows is in memory once, until it is handed on. Values that pages
    # hold themselves would be kept to the end of the group.
    if all(page.numbered for page in found if page.values):
        file, whole = numbered, 0
    else:
        whole = size if arrow.types.is_dictionary(file.schema_arrow.field(column).type) else 0
    if (whole := max(whole, *(page.size for page in found), 0)) > 4 * most + _PAGE_BYTES:
        raise ValueError(
            f"row group {group} has a page of {whole / 1e6:,.0f} MB, more than four of"
            f" {most / 1e6:g} MB and {_PAGE_BYTES / 1e6:g}: raise --max-record-mb"
        )
    rows = _PARQUET_ROWS
    for page in found:
        if page.values and not page.numbered:  # as many as the densest page has in a batch's bytes
            rows = min(rows, BATCH_BYTES * page.values // max(page.size, 1))
        elif not page.values and file is not numbered:  # each may be the whole dictionary
            rows = min(rows, _PAGE_BYTES // max(page.size, 1))
    for table in file.iter_batches(max(rows, 1), row_groups=[group], columns=[column]):
        cells = table.column(0)
        if arrow.types.is_dictionary(cells.type):
            values, places = cells.dictionary, cells.indices.to_pylist()
        else:
            values, places = cells.cast(arrow.large_string()), range(len(cells))
        sizes = compute.binary_length(values).to_pylist()
        documents: list[bytes | int | None] = []
        held = 0
        for at in places:
            large = at is not None and sizes[at] is not None and sizes[at] > most
            value = None if at is None or large else _cell_bytes(values[at])
            documents.append(most if large else value)
            held += len(value or b"")
            if held >= BATCH_BYTES:
                yield documents
                documents, held = [], 0
        if documents:
            yield documents


def _cell_bytes(cell: Any) -> bytes | None:
    """The cell as bytes, not str: decoding here would end the file at a cell that is not UTF-8."""
    return cell.as_buffer().to_pybytes() if cell.is_valid else None
