"""Reads documents from token shards, the format of nanoGPT-style FineWeb scripts.

A shard is 256 int32 (magic, version, number of tokens, zeros), then uint16 tokens, little-endian.
Those scripts write the end-of-document id before each document, and cut a document where a shard is
full. Megatron expects the id after each document. So tokens are split after each id, and the rest
of a shard continues in the next shard.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence

import numpy as np

from megatron_mlra.data.encode import Encoded, token_dtype
from megatron_mlra.data.errors import BadRecordError, InputError
from megatron_mlra.data.sources import Source

MAGIC = 20240520
VERSION = 1
DEFAULT_EOD = 50256
_HEADER_BYTES = 256 * 4
_CHUNK_TOKENS = 1 << 22


def check_shards(sources: Sequence[Source]) -> None:
    """Check the header and the size of every shard.

    Raises:
        InputError: wrong magic, version or size; the message gives the numbers found and expected.
    """
    for source in sources:
        _token_count(source.path)


def read_shards(
    sources: Sequence[Source], *, eod: int, vocab_size: int, append_eod: bool, record_bytes: int
) -> Generator[Encoded]:
    """Documents of consecutive shards, a chunk at a time.

    Raises:
        BadRecordError: a token is outside the vocabulary, the first shard holds no EOD, or a
            document has more than `record_bytes` (a document is held in memory whole).
    """
    dtype = token_dtype(vocab_size)
    rest = np.empty(0, np.uint16)  # tokens of the document whose end is not read yet
    for index, source in enumerate(sources):
        ended = 0
        for chunk, start in _chunks(source.path):
            outside = np.flatnonzero(chunk >= vocab_size)
            if outside.size:
                raise BadRecordError(
                    f"{source.path}: token {chunk[outside[0]]} at position {start + outside[0]} "
                    f"is outside the vocabulary of {vocab_size}: pass --vocab-size"
                )
            stream = np.concatenate([rest, chunk])
            ends = np.flatnonzero(stream == eod)
            ended += ends.size
            closed = ends[-1] + 1 if ends.size else 0
            rest = stream[closed:].copy()
            if rest.nbytes > record_bytes:
                raise BadRecordError(
                    f"{source.path}: a document has more than {record_bytes / 1e6:g} MB: raise"
                    " --max-record-mb, or pass the right --eod-id"
                )
            tokens, lengths = _documents(stream[:closed], ends, append_eod)
            yield Encoded(index, tokens.astype(dtype), lengths, consumed=chunk.nbytes)
        if index == 0 and not ended:
            # With a wrong id the whole corpus would be one document, in memory.
            raise BadRecordError(f"{source.path} holds no token {eod}: pass the right --eod-id")
    if rest.size:
        tokens = np.append(rest, np.uint16(eod)) if append_eod else rest
        yield Encoded(len(sources) - 1, tokens.astype(dtype), np.array([tokens.size], np.int64))


def _documents(
    stream: np.ndarray, ends: np.ndarray, append_eod: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and lengths (int64 [documents]) of the documents of ``stream`` that are not empty.

    Args:
        ends: positions of the EOD ids in ``stream``.
    """
    lengths = np.diff(ends, prepend=-1)
    full = lengths > 1
    tokens = np.delete(stream, ends[~full] if append_eod else ends)
    return tokens, (lengths[full] - (not append_eod)).astype(np.int64)


def _chunks(path: str) -> Iterator[tuple[np.ndarray, int]]:
    """Chunks of a shard, uint16 [<= _CHUNK_TOKENS], each with its first token's position."""
    count = _token_count(path)
    with open(path, "rb") as file:
        file.seek(_HEADER_BYTES)
        for start in range(0, count, _CHUNK_TOKENS):
            size = min(_CHUNK_TOKENS, count - start)
            chunk = np.fromfile(file, dtype="<u2", count=size)
            if chunk.size != size:
                raise BadRecordError(f"{path} ended at token {start + chunk.size} of {count}")
            yield chunk, start


def _token_count(path: str) -> int:
    size = os.path.getsize(path)
    if size < _HEADER_BYTES:
        raise InputError(
            f"{path} is truncated: found {size} bytes, expected {_HEADER_BYTES} or more"
        )
    header = np.fromfile(path, dtype="<i4", count=3)
    for name, found, expected in (("magic", header[0], MAGIC), ("version", header[1], VERSION)):
        if found != expected:
            raise InputError(
                f"{path} is not a token shard: found {name} {found}, expected {expected}"
            )
    found = (size - _HEADER_BYTES) / 2
    if found != header[2]:
        raise InputError(
            f"{path} is truncated or damaged: found {found:g} tokens, expected {header[2]}"
        )
    if not header[2]:
        raise InputError(f"{path} is empty: its header says 0 tokens")
    return int(header[2])
