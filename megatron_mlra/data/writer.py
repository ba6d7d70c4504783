"""Writes a Megatron indexed dataset so that it appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import uuid
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np

from megatron_mlra.command_line.parser import make_folder
from megatron_mlra.command_line.plain_file import sha256
from megatron_mlra.command_line.signals import deferred
from megatron_mlra.data.contents import SUMMED
from megatron_mlra.data.errors import InputError
from megatron_mlra.data.index import INDEX_HEADER
from megatron_mlra.data.metadata import read_metadata

SUFFIXES = (".bin", ".idx", ".json")
MAX_DOCUMENT_TOKENS = np.iinfo(np.int32).max
"""An index stores lengths as int32."""


class DatasetWriter:
    """Context manager that writes ``PREFIX.bin``, ``PREFIX.idx`` and ``PREFIX.json``.

    Files are written as ``*.partial-PID-RANDOM`` beside the target, and ``publish`` renames them
    into place. If the block ends without ``publish``, by an exception or a signal, they are removed
    and earlier output stays as it was.
    """

    def __init__(self, prefix: str, dtype: type[np.number], *, overwrite: bool) -> None:
        self._final = {suffix: prefix + suffix for suffix in SUFFIXES}
        # Processes of two containers that share a folder may have the same id.
        own = f"{os.getpid()}-{uuid.uuid4().hex[:16]}"
        self._partial = {suffix: f"{path}.partial-{own}" for suffix, path in self._final.items()}
        self._dtype = dtype
        self._overwrite = overwrite
        self._builder: Any = None

    def __enter__(self) -> DatasetWriter:
        check_output(self._final[".bin"].removesuffix(".bin"), overwrite=self._overwrite)
        try:
            open(self._partial[".bin"], "xb").close()
        except OSError as error:
            raise InputError(f"cannot write {self._final['.bin']}: {error.strerror}") from error
        return self

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: all documents, concatenated, of the writer's dtype, [sum of lengths].
            lengths: tokens of each document, [documents].

        Raises:
            InputError: a document has more tokens than an index can store.
        """
        if self._builder is None:
            self._builder = _indexed_dataset().IndexedDatasetBuilder(
                self._partial[".bin"], dtype=self._dtype
            )
        start = 0
        for length in lengths.tolist():
            if length > MAX_DOCUMENT_TOKENS:
                raise InputError(
                    f"a document has {length} tokens; an index holds {MAX_DOCUMENT_TOKENS} at most"
                )
            with _naming(self._final[".bin"]):
                self._builder.add_document(tokens[start : start + length], [length])
            start += length

    def publish(self, metadata: dict[str, Any]) -> None:
        """Complete the files and rename them into place, ``.bin`` before ``.idx``. The files'
        checksums are added to ``metadata``.

        An earlier index is removed first: at no moment is there an index beside data that it does
        not describe.

        Raises:
            InputError: ``overwrite`` is off, and another process has written the output meanwhile.
        """
        with _naming(self._final[".bin"]):
            self._builder.finalize(self._partial[".idx"])
        metadata["sha256"] = {suffix: sha256(self._partial[suffix]) for suffix in SUMMED}
        with open(self._partial[".json"], "x", encoding="utf-8") as file:
            json.dump(metadata, file, indent=2, ensure_ascii=False)
            file.write("\n")
        for path in self._partial.values():
            _sync(path)
        with deferred():
            if not self._overwrite:
                check_output(self._final[".bin"].removesuffix(".bin"), overwrite=False)
                self._claim()
            for suffix in (".json", ".idx"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._final[suffix])
            for suffix in SUFFIXES:
                os.replace(self._partial[suffix], self._final[suffix])

    def _claim(self) -> None:
        """Create ``.bin``, which succeeds in only one of several processes.

        Raises:
            InputError: the file exists.
        """
        try:
            open(self._final[".bin"], "xb").close()
        except FileExistsError:
            raise InputError(
                f"output {self._final['.bin']} exists: pass --overwrite to replace it"
            ) from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._builder is not None:
            # Closing flushes, which fails again on a full disk.
            with contextlib.suppress(OSError):
                self._builder.data_file.close()
        for path in self._partial.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def check_output(prefix: str, *, overwrite: bool) -> None:
    """Make the folder of ``prefix``, and check that output may be written there.

    Raises:
        InputError: ``prefix`` names no file; its folder cannot be made; or output exists and
            ``overwrite`` is off, or is no dataset.
    """
    if prefix.endswith((".bin", ".idx")):
        raise InputError(f"--output-prefix {prefix}: leave out the suffix {prefix[-4:]}")
    if not os.path.basename(prefix):
        raise InputError(f"--output-prefix {prefix!r} names a folder: add a file name")
    folder = os.path.dirname(prefix) or "."
    try:
        make_folder(folder, f"--output-prefix {prefix}")
    except ValueError as error:
        raise InputError(str(error)) from None
    for suffix in SUFFIXES:
        if os.path.isdir(prefix + suffix):
            raise InputError(f"output {prefix + suffix} is a folder")
        if os.path.lexists(prefix + suffix) and not overwrite:
            raise InputError(f"output {prefix + suffix} exists: pass --overwrite to replace it")
    if overwrite:
        _check_replaceable(prefix)


def _check_replaceable(prefix: str) -> None:
    """Check that the files that --overwrite would replace belong to a dataset.

    Raises:
        InputError: names the file that does not.
    """
    known = {
        ".idx": lambda path: _begins(path, INDEX_HEADER),
        # A .bin has no header; its index tells.
        ".bin": lambda path: os.path.lexists(prefix + ".idx") or not os.path.getsize(path),
        ".json": lambda path: "tokenizer" in (read_metadata(prefix) or {}),
    }
    for suffix, is_known in known.items():
        path = prefix + suffix
        try:
            if os.path.lexists(path) and not (os.path.isfile(path) and is_known(path)):
                raise InputError(path)
        except (InputError, OSError):
            raise InputError(
                f"output {path} is no part of a dataset, so --overwrite leaves it: remove it, or"
                " use another --output-prefix"
            ) from None


def _begins(path: str, header: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(header)) == header


def _indexed_dataset() -> Any:
    # Imported here, since Megatron takes seconds to import. Its warnings concern accelerators,
    # which preprocessing does not need.
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets import indexed_dataset
    finally:
        logging.disable(logging.NOTSET)
    return indexed_dataset


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Add the file's name to OSErrors without one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise
