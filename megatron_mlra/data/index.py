"""PREFIX.idx: the places of the documents of a Megatron dataset in PREFIX.bin, read and checked.

The layout, little-endian: a header of 34 bytes (magic, version, code of the token type, number n of
sequences, number b of document bounds), n lengths in tokens (int32), n offsets in bytes (int64), b
document bounds, which are sequence numbers (int64).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

import numpy as np

from megatron_mlra.data.errors import InputError

INDEX_HEADER = b"MMIDIDX\x00\x00"
"""The first bytes of a Megatron index."""

TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Megatron's code -> integer type of token ids."""

_HEAD = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 20
"""Sequences checked at a time, which bounds memory."""


@dataclass(frozen=True)
class Index:
    """A checked index."""

    lengths: np.ndarray
    """Tokens of every sequence, int32 `[n]`, mapped from the file. A sequence is a document to
    Megatron's GPT dataset."""

    token_type: np.dtype
    """Type of the tokens in PREFIX.bin, where the sequences follow one another without gaps."""

    def tokens(self, first: int, last: int) -> int:
        """Number of tokens of the sequences `first` to `last - 1`."""
        return int(self.lengths[first:last].sum(dtype=np.int64))


def read_index(prefix: str) -> Index:
    """The index of the dataset at `prefix`. Its offsets cover PREFIX.bin exactly.

    Raises:
        InputError: the file is no index, is damaged, or belongs to other data; names the file and
            the fault.
    """
    try:
        return _read(prefix)
    except _Damaged as damage:
        raise InputError(
            f"data file {prefix}.idx {damage}; preprocess the data again, or copy it again"
        ) from None


def count_tokens(prefix: str) -> int:
    """Number of tokens of a dataset whose index `read_index` has checked, without reading it."""
    with open(prefix + ".idx", "rb") as file:
        code = _HEAD.unpack(file.read(_HEAD.size))[2]
    return os.path.getsize(prefix + ".bin") // np.dtype(TOKEN_TYPES[code]).itemsize


class _Damaged(Exception):
    """An index is wrong; the message continues the file's name."""


def _read(prefix: str) -> Index:
    path = prefix + ".idx"
    with open(path, "rb") as file:
        head, size = file.read(_HEAD.size), os.fstat(file.fileno()).st_size
    if len(head) < _HEAD.size or not head.startswith(INDEX_HEADER):
        raise _Damaged("is not a Megatron index")
    _, version, code, sequences, bounds = _HEAD.unpack(head)
    if version != 1 or code not in TOKEN_TYPES:
        raise _Damaged(f"is not a Megatron index of tokens (version {version}, type {code})")
    expected = _HEAD.size + 12 * sequences + 8 * bounds
    if size != expected:
        raise _Damaged(
            f"is damaged: {size:,} bytes, where {sequences:,} sequences take {expected:,}"
        )
    stored = os.path.getsize(prefix + ".bin")
    if not sequences:
        raise InputError(f"data file {path} lists no documents; preprocess the data again")

    data = np.memmap(path, mode="r")

    def part(dtype: str, count: int, offset: int) -> np.ndarray:
        return np.frombuffer(data, dtype, count, offset)

    lengths = part("<i4", sequences, _HEAD.size)
    offsets = part("<i8", sequences, _HEAD.size + 4 * sequences)
    documents = part("<i8", bounds, _HEAD.size + 12 * sequences)
    end = _check_sequences(lengths, offsets, np.dtype(TOKEN_TYPES[code]).itemsize)
    _check_documents(documents, sequences)
    if not end:
        raise InputError(f"data file {path} lists no tokens; preprocess the data again")
    if stored != end:
        what = "is truncated" if stored < end else "is not the data of its index"
        raise InputError(
            f"data file {prefix}.bin {what}: {stored:,} of {end:,} bytes; preprocess the data"
            " again, or copy it again"
        )
    return Index(lengths, np.dtype(TOKEN_TYPES[code]).newbyteorder("<"))


def _check_sequences(lengths: np.ndarray, offsets: np.ndarray, itemsize: int) -> int:
    """Check that each sequence begins where the previous one ends.

    Returns:
        The end of the last sequence, in bytes.
    """
    end = 0
    for first in range(0, len(lengths), _CHUNK):
        some = lengths[first : first + _CHUNK].astype(np.int64)
        if (negative := some < 0).any():
            place = int(negative.argmax())
            raise _Damaged(f"is damaged: document {first + place:,} has {some[place]} tokens")
        ends = end + np.cumsum(some) * itemsize
        starts = np.concatenate([[end], ends[:-1]])
        if (wrong := offsets[first : first + _CHUNK] != starts).any():
            place = int(wrong.argmax())
            raise _Damaged(
                f"is damaged: document {first + place:,} begins at byte"
                f" {offsets[first + place]:,}, not {starts[place]:,}"
            )
        end = int(ends[-1])
    return end


def _check_documents(bounds: np.ndarray, sequences: int) -> None:
    """Check that the document bounds do not decrease, from 0 to the number of sequences."""
    last = 0
    for first in range(0, len(bounds), _CHUNK):
        some = bounds[first : first + _CHUNK]
        if (np.diff(some, prepend=last) < 0).any() or (first == 0 and some[0] != 0):
            raise _Damaged("is damaged: its bounds of documents do not go up from 0")
        last = int(some[-1])
    if last != sequences:
        raise _Damaged(f"is damaged: its documents end at sequence {last:,} of {sequences:,}")
