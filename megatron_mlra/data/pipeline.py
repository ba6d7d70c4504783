"""Preprocessing, from arguments to files: checks, worker processes, order, counts."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import Any

from tqdm import tqdm

from megatron_mlra.command_line.numbers import MOST_PROCESSES
from megatron_mlra.command_line.progress_bar import bar
from megatron_mlra.command_line.signals import deferred
from megatron_mlra.data.encode import Encoded, Encoder, token_dtype
from megatron_mlra.data.errors import BadRecordError, InputError
from megatron_mlra.data.metadata import METADATA_VERSION
from megatron_mlra.data.readers import RECORD_BYTES, Batch, check_readers, read_batches
from megatron_mlra.data.shards import DEFAULT_EOD, check_shards, read_shards
from megatron_mlra.data.sources import Source, find_sources
from megatron_mlra.data.tokenizers import Tokenizer, TokenizerSpec, build_tokenizer
from megatron_mlra.data.writer import SUFFIXES, DatasetWriter, check_output

_LOOK = 5.0
"""Seconds of waiting for a worker, before all workers are checked."""
_BATCHES_IN_FLIGHT = 4
"""Batches per worker that are submitted at once: enough to hide reading, few enough for memory."""


@dataclass(frozen=True)
class PreprocessConfig:
    """What to preprocess, and how."""

    inputs: tuple[str, ...]
    """Paths and globs."""
    output_prefix: str
    """Output is PREFIX.bin, PREFIX.idx and PREFIX.json."""
    tokenizer: TokenizerSpec | None = None
    """Required for text; None for token shards."""
    json_key: str = "text"
    """Key of the text in a JSON line."""
    parquet_column: str = "text"
    """Column of the text in a parquet file."""
    record_bytes: int = RECORD_BYTES
    """Most bytes of one line, text file, parquet cell or document of token shards, decompressed."""
    split_lines: bool = False
    """Every line of a text file is a document; otherwise the whole file is one document."""
    append_eod: bool = True
    """End every document with the end-of-document id."""
    shard_eod_id: int = DEFAULT_EOD
    """Token shards: the id that separates documents."""
    shard_vocab_size: int | None = None
    """Token shards: size of their vocabulary; default ``shard_eod_id`` + 1."""
    workers: int = 1
    """Number of tokenising processes; does not change the output."""
    on_error: str = "fail"
    """fail: a bad record stops the run; skip: bad records are reported, counted and left out."""
    overwrite: bool = False
    """Replace earlier output."""


def preprocess(
    config: PreprocessConfig,
    *,
    report: Callable[[str], None] = print,
    progress: bool = False,
) -> dict[str, Any]:
    """Write the dataset of ``config`` and return its metadata, the content of PREFIX.json.

    Args:
        report: called with ``file:line: reason`` for every skipped record.
        progress: show a bar of bytes read.

    Raises:
        BadRecordError: a record is bad and ``on_error`` is "fail"; nothing is written.
        InputError: arguments or inputs are wrong; nothing is written.
        OSError: reading or writing failed; nothing is written.
    """
    sources = _check(config)
    if sources[0].format == "tokens":
        eod = config.shard_eod_id
        vocab_size = config.shard_vocab_size or eod + 1
        described: dict[str, Any] = {"type": "pretokenized"}
        encoded = read_shards(
            sources,
            eod=eod,
            vocab_size=vocab_size,
            append_eod=config.append_eod,
            record_bytes=config.record_bytes,
        )
    else:
        tokenizer = build_tokenizer(config.tokenizer)
        eod, vocab_size, described = tokenizer.eod, tokenizer.vocab_size, tokenizer.describe()
        encoded = _encode(config, sources, tokenizer)
    dtype = token_dtype(vocab_size)
    with (
        contextlib.closing(encoded),
        DatasetWriter(config.output_prefix, dtype, overwrite=config.overwrite) as writer,
    ):
        counts = _write(writer, encoded, sources, config.on_error, report, progress)
        metadata = {
            "version": METADATA_VERSION,
            "tokenizer": described,
            "vocab_size": vocab_size,
            "eod_id": eod,
            "append_eod": config.append_eod,
            "dtype": dtype.__name__,
            **{key: sum(count[key] for count in counts) for key in counts[0]},
            "on_error": config.on_error,
            "sources": [
                {"path": source.path, "bytes": source.size, **count}
                for source, count in zip(sources, counts, strict=True)
            ],
        }
        writer.publish(metadata)
    return metadata


def _check(config: PreprocessConfig) -> list[Source]:
    """The sources, after all checks that need not read a document."""
    if config.workers < 1:
        raise InputError(f"--workers {config.workers}: use 1 or more")
    if config.workers > MOST_PROCESSES:
        raise InputError(f"--workers {config.workers}: use at most {MOST_PROCESSES}")
    if config.record_bytes < 1:
        raise InputError(f"--max-record-mb {config.record_bytes / 1e6:g}: use e.g. 1000")
    if config.on_error not in ("fail", "skip"):
        raise InputError(f"--on-error {config.on_error}: use fail or skip")
    sources = find_sources(config.inputs)
    targets = {os.path.realpath(config.output_prefix + suffix) for suffix in SUFFIXES}
    for source in sources:
        if os.path.realpath(source.path) in targets:
            raise InputError(f"output would replace the input {source.path}: choose another prefix")
    check_output(config.output_prefix, overwrite=config.overwrite)
    if sources[0].format == "tokens":
        _check_shard_options(config)
        check_shards(sources)
        return sources
    if config.tokenizer is None:
        raise InputError("text needs --tokenizer byte, hf or tiktoken")
    if config.shard_vocab_size is not None:
        raise InputError("--vocab-size is for token shards: a tokenizer knows its own")
    if config.on_error == "fail":
        for source in sources:
            if source.size == 0:
                raise InputError(f"input {source.path} is empty (0 bytes)")
    check_readers(sources, config.parquet_column)
    return sources


def _check_shard_options(config: PreprocessConfig) -> None:
    if config.tokenizer is not None:
        raise InputError("token shards (.bin) are tokenised already: leave out --tokenizer")
    eod, vocab_size = config.shard_eod_id, config.shard_vocab_size
    if not 0 <= eod < 1 << 16:
        raise InputError(f"--eod-id {eod} is no uint16")
    if vocab_size is not None and vocab_size <= eod:
        raise InputError(f"--vocab-size {vocab_size} does not hold --eod-id {eod}")


def _write(
    writer: DatasetWriter,
    encoded: Generator[Encoded],
    sources: list[Source],
    on_error: str,
    report: Callable[[str], None],
    progress: bool,
) -> list[dict[str, int]]:
    """Write all documents; returns the counts of each source."""
    keys = ("documents", "tokens", "empty_documents", "bad_records")
    counts = [dict.fromkeys(keys, 0) for _ in sources]
    size = sum(source.size for source in sources)
    with bar(total=size, unit="B", unit_scale=True, desc="tokenising", shown=progress) as shown:
        for number, part in enumerate(encoded):
            if not number:
                shown.unpause()  # start the clock: workers took their time to start
            if part.problems and on_error == "fail":
                raise BadRecordError(f"{part.problems[0]} (--on-error skip leaves it out)")
            for problem in part.problems:
                with tqdm.external_write_mode():
                    report(problem)
            if part.lengths.size:
                writer.add(part.tokens, part.lengths)
            count = counts[part.source]
            count["documents"] += part.lengths.size
            count["tokens"] += part.tokens.size
            count["empty_documents"] += part.empty
            count["bad_records"] += len(part.problems)
            shown.update(part.consumed)
    if not any(count["documents"] for count in counts):
        bad = sum(count["bad_records"] for count in counts)
        raise InputError(f"no documents found in {len(sources)} input files ({bad} bad records)")
    return counts


def _encode(
    config: PreprocessConfig, sources: list[Source], tokenizer: Tokenizer
) -> Generator[Encoded]:
    batches = (
        batch
        for index, source in enumerate(sources)
        for batch in read_batches(
            index,
            source,
            split_lines=config.split_lines,
            parquet_column=config.parquet_column,
            record_bytes=config.record_bytes,
        )
    )
    if config.workers == 1:
        encoder = Encoder(tokenizer, append_eod=config.append_eod, json_key=config.json_key)
        yield from map(encoder.encode, batches)
    else:
        yield from _encode_in_workers(config, batches)


def _encode_in_workers(config: PreprocessConfig, batches: Iterator[Batch]) -> Generator[Encoded]:
    """Encode in processes; results come in the order of the batches."""
    pool = ProcessPoolExecutor(
        config.workers,
        # Not fork: the parent may have imported torch, whose threads a fork does not copy.
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(config.tokenizer, config.append_eod, config.json_key),
    )
    pending: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            # Submitting may start workers, which inherit the blocked signals. A terminal sends
            # Ctrl-C to all processes of the group, and only the parent must act on it.
            with deferred():
                pending.append(pool.submit(_encode_batch, batch))
            if len(pending) >= config.workers * _BATCHES_IN_FLIGHT:
                yield _result(pool, pending.popleft())
        while pending:
            yield _result(pool, pending.popleft())
    except BaseException:
        _abandon(pool)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _result(pool: ProcessPoolExecutor, future: Future[Encoded]) -> Encoded:
    """What a worker made of a batch.

    Raises:
        BrokenProcessPool: a worker died.
    """
    while True:
        try:
            return future.result(timeout=_LOOK)
        except TimeoutError:
            # The pool notices a death, but not of a worker that had half a result written.
            if not all(process.is_alive() for process in (pool._processes or {}).values()):
                raise BrokenProcessPool("a worker died") from None


def _abandon(pool: ProcessPoolExecutor) -> None:
    """Kill the workers, and have the pool's thread read no further in what one of them had half
    written: it would wait for the rest as long as anybody can write it, this process among them."""
    for process in [*(pool._processes or {}).values()]:
        process.kill()
    pool._result_queue._writer.close()


_encoder: Encoder | None = None
"""The encoder of this worker process."""


def _start_worker(spec: TokenizerSpec, append_eod: bool, json_key: str) -> None:
    global _encoder
    # Ctrl-C stays blocked. SIGTERM must not: by it the pool ends its workers after one has died.
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGINT})
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encoder = Encoder(build_tokenizer(spec), append_eod=append_eod, json_key=json_key)


def _exit_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def _encode_batch(batch: Batch) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(batch)
