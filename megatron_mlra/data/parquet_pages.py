"""What the pages of a parquet column say of themselves, read before any of them is decompressed.

A footer may say anything of a column. What reading it takes is what its pages say: pyarrow makes a
buffer of a page's decompressed size, and keeps the cells of a batch's rows; of a column that is
read as numbers of distinct values it keeps all values until the row group ends.
Format: Apache Parquet's `PageHeader`, in Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

_HEADER_BYTES = 16 << 20
"""Most bytes of a header, as pyarrow has it."""
_DEPTH = 8
_SIZE, _COMPRESSED = 2, 3
_DATA = {5: 2, 8: 4}
"""Fields of `PageHeader` for data -> in them, the field of the encoding; field 1 is the number of
values."""
_NUMBERED = (2, 8)
"""Encodings PLAIN_DICTIONARY and RLE_DICTIONARY."""


@dataclass(frozen=True)
class Page:
    """One page of a column."""

    size: int
    """Bytes, decompressed."""
    values: int
    """Cells, null ones too; 0 of a dictionary."""
    numbered: bool
    """Whether cells are numbers of values in the dictionary."""


def pages(raw: IO[bytes], file_bytes: int, column: Any) -> Iterator[Page]:
    """The pages of a column in one row group.

    Args:
        raw: the file.
        column: pyarrow's description of the column.

    Raises:
        ValueError: a page or its header lies outside the file, or is none.
    """
    at = column.data_page_offset
    if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < at:
        at = column.dictionary_page_offset
    end = at + column.total_compressed_size
    if not 0 <= at <= end <= file_bytes:
        raise ValueError(f"a column from byte {at:,} to {end:,} of a file of {file_bytes:,} bytes")
    while at < end:
        raw.seek(at)
        header = _struct(raw, at + _HEADER_BYTES, _DEPTH)
        size, compressed, values, encoding = header.get(_SIZE), header.get(_COMPRESSED), 0, None
        for field, place in _DATA.items():
            if isinstance(data := header.get(field), dict):
                values, encoding = data.get(1), data.get(place)
        for number in (size, compressed, values):
            if not isinstance(number, int) or not 0 <= number <= 1 << 31:
                raise ValueError(f"the page at byte {at:,} is none")
        yield Page(size, values, encoding in _NUMBERED)
        if (at := raw.tell() + compressed) > file_bytes:
            raise ValueError(f"a page up to byte {at:,} of a file of {file_bytes:,} bytes")


def _struct(raw: IO[bytes], end: int, depth: int) -> dict[int, Any]:
    """The numbers and structures of a structure, by field."""
    fields: dict[int, Any] = {}
    field = 0
    while head := _bytes(raw, 1)[0]:
        field = field + (head >> 4) if head >> 4 else _signed(raw)
        fields[field] = _value(raw, head & 15, end, depth)
    return fields


def _value(raw: IO[bytes], kind: int, end: int, depth: int) -> Any:
    """A value of one of Thrift's kinds, which ends before `end`; None of those not needed here."""
    if raw.tell() > end or depth < 0:
        raise ValueError("a page's header has no end")
    if kind in (4, 5, 6):
        return _signed(raw)
    if kind == 12:
        return _struct(raw, end, depth - 1)
    if kind in (3, 7):
        _bytes(raw, 1 if kind == 3 else 8)
    elif kind == 8:
        raw.seek(min(_unsigned(raw), end), 1)
    elif kind in (9, 10):
        head = _bytes(raw, 1)[0]
        for _ in range(_unsigned(raw) if head >> 4 == 15 else head >> 4):
            # Truth values are part of a field's head, and a byte of their own in a list.
            _value(raw, 3 if head & 15 in (1, 2) else head & 15, end, depth - 1)
    elif kind not in (1, 2):
        raise ValueError("a page's header is none")
    return None


def _signed(raw: IO[bytes]) -> int:
    value = _unsigned(raw)
    return value >> 1 ^ -(value & 1)


def _unsigned(raw: IO[bytes]) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _bytes(raw, 1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a page's header has a number without end")


def _bytes(raw: IO[bytes], count: int) -> bytes:
    read = raw.read(count)
    if len(read) < count:
        raise ValueError("a page's header ends with the file")
    return read
