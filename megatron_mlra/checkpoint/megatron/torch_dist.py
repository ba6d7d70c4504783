"""Reads the torch_dist files of a Megatron checkpoint without a process group.

The index (files/torch_dist_index.py) maps each block of each tensor to a range of bytes in a file.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mlra.checkpoint.files import manifest
from megatron_mlra.checkpoint.files.inside import inside
from megatron_mlra.checkpoint.files.torch_dist_index import (
    COMMON_FILE,
    ForbiddenNames,
    check_files,
    check_format,
    check_objects,
    read_metadata,
)
from megatron_mlra.checkpoint.files.torch_file import (
    ForbiddenCode,
    check_entry,
    check_stored,
    load_entry,
    read_object,
)
from megatron_mlra.checkpoint.files.tracker import FORMAT_FILE
from megatron_mlra.description.model import CheckpointError

COMMON_KEY = "common_state/shard_0_1"
_SMALL_FILES = (COMMON_FILE, FORMAT_FILE)


class TorchDistFolder:
    """An `iter_*` folder. Shapes come from the index; blocks of tensors are read on demand.

    No code from the folder runs: entries that are not tensors are checked here, tensors when read.

    Args:
        verify: compare files with the checkpoint's checksums, if it has any: small files here,
            those of tensors in `check_contents`.

    Raises:
        ForbiddenNames: the folder holds code; lists the names.
        CheckpointError: a file is missing, short or damaged; or Megatron would read other files of
            the folder than the index lists.
    """

    def __init__(self, path: Path, verify: bool = False) -> None:
        self.path = path
        self.verify = verify
        self._common: dict[str, Any] | None = None
        if verify:
            there = [name for name in _SMALL_FILES if inside(path, name).is_file()]
            manifest.check(path, [".metadata", *there])
        self.metadata = read_metadata(path)
        check_format(path)
        check_files(path, self.metadata)
        check_objects(path, self.metadata)
        self.stored = {
            (index.fqn, tuple(index.offset or ())): info
            for index, info in self.metadata.storage_data.items()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored name -> global shape of every tensor."""
        return {
            name: tuple(entry.size)
            for name, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def check_contents(self, names: Iterable[str]) -> None:
        """Compare the files of these entries with their checksums, if `verify` is on.

        Raises:
            CheckpointError: a file differs; names the first.
        """
        wanted = set(names)
        if self.verify:
            holding = {i.relative_path for (name, _), i in self.stored.items() if name in wanted}
            manifest.check(self.path, holding)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a stored tensor."""
        return self.metadata.state_dict_metadata[name].properties.dtype

    def tensor(self, name: str, at: tuple[int, ...] = ()) -> torch.Tensor:
        """A stored tensor, or its part at the indices `at` of its first dimensions (layer, expert).

        Raises:
            CheckpointError: a block of the tensor is missing or cannot be read.
        """
        try:
            return self._assemble(name, at)
        except (RuntimeError, IndexError, TypeError, AttributeError) as error:
            said = " ".join(str(error).split())
            raise CheckpointError(
                f"checkpoint {self.path}: .metadata describes {name} wrongly ({said:.200})"
            ) from None

    def _assemble(self, name: str, at: tuple[int, ...]) -> torch.Tensor:
        entry = self.metadata.state_dict_metadata[name]
        shape = tuple(entry.size)[len(at) :]
        wanted = [chunk for chunk in entry.chunks if _holds(chunk, at)]
        if len(wanted) == 1 and tuple(wanted[0].sizes)[len(at) :] == shape:
            return self._block(name, wanted[0], at).view(shape)
        out = torch.empty(shape, dtype=entry.properties.dtype)
        filled = 0
        for chunk in wanted:
            offsets, sizes = tuple(chunk.offsets)[len(at) :], tuple(chunk.sizes)[len(at) :]
            block = self._block(name, chunk, at)
            out[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] = block
            filled += block.numel()
        if filled != out.numel():
            raise CheckpointError(
                f"checkpoint {self.path}: {name} has blocks for {filled} of {out.numel()} numbers"
            )
        return out

    def _block(self, name: str, chunk: Any, at: tuple[int, ...]) -> torch.Tensor:
        info = self.stored.get((name, tuple(chunk.offsets)))
        if info is None:
            raise CheckpointError(f"checkpoint {self.path}: a block of {name} is not stored")
        block = self._load(info, name)
        if block.dtype != self.dtype(name):
            raise CheckpointError(
                f"checkpoint {self.path}: a block of {name} is {block.dtype}, and .metadata says"
                f" {self.dtype(name)}"
            )
        expected = tuple(chunk.sizes)
        if block.numel() != torch.Size(expected).numel():
            raise CheckpointError(
                f"checkpoint {self.path}: a block of {name} has {block.numel()} numbers, not"
                f" {torch.Size(expected).numel()}"
            )
        return block.view(expected)[tuple(i - o for i, o in zip(at, chunk.offsets, strict=False))]

    def _load(self, info: Any, name: str) -> torch.Tensor:
        try:
            with open(self.path / info.relative_path, "rb", buffering=0) as file:
                part = io.BufferedReader(_Part(file, info.offset, info.length))
                value = load_entry(part, info.length)
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self.path}: {name} in {info.relative_path} cannot be read"
                f" ({' '.join(str(error).split()):.200})"
            ) from None
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"checkpoint {self.path}: {name} is no tensor")
        try:
            return check_stored(value)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {self.path}: {name} is {error}") from None

    def _bytes(self, info: Any) -> bytes:
        with open(self.path / info.relative_path, "rb") as file:
            file.seek(info.offset)
            return file.read(info.length)

    def check_tensors(self) -> None:
        """Check every tensor's entry without reading its numbers.

        Raises:
            ForbiddenNames: an entry names code.
            CheckpointError: an entry is damaged, or has fewer bytes than it states.
        """
        for index, info in self.metadata.storage_data.items():
            try:
                with open(self.path / info.relative_path, "rb", buffering=0) as file:
                    part = io.BufferedReader(_Part(file, info.offset, info.length), 512)
                    check_entry(part, info.length)
            except (OSError, ValueError) as error:
                kind = ForbiddenNames if isinstance(error, ForbiddenCode) else CheckpointError
                raise kind(
                    f"checkpoint {self.path}: {index.fqn} in {info.relative_path}: {error}"
                ) from None

    def raw(self, name: str) -> bytes:
        """The bytes of an entry that is not a tensor."""
        return self._bytes(self.stored[name, ()])

    def common_state(self) -> dict[str, Any]:
        """Megatron's state besides tensors: `args`, `iteration`, ... Objects of unknown classes are
        inert. The result is cached; do not change it.

        Raises:
            CheckpointError: the state is missing or cannot be read.
        """
        if self._common is None:
            self._common = self._read_common_state()
        return self._common

    def _read_common_state(self) -> dict[str, Any]:
        try:
            if (COMMON_KEY, ()) in self.stored:
                data = self.raw(COMMON_KEY)
            else:
                data = inside(self.path, COMMON_FILE).read_bytes()
            state = read_object(io.BytesIO(data), len(data)).value
        except CheckpointError:
            raise
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {self.path}: its arguments cannot be read ({error})"
            ) from None
        if isinstance(state, list) and len(state) == 1:
            state = state[0]
        if not isinstance(state, dict):
            raise CheckpointError(f"checkpoint {self.path}: its common state is no dictionary")
        return state


class _Part(io.RawIOBase):
    """A range of bytes of a file, as a file: torch.load reads from it without a second copy."""

    def __init__(self, file: io.RawIOBase, start: int, length: int) -> None:
        self.file, self.start, self.length, self.at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        self.at = origin + offset
        return self.at

    def readinto(self, buffer) -> int:
        view = memoryview(buffer)[: max(self.length - self.at, 0)]
        self.file.seek(self.start + self.at)
        count = self.file.readinto(view)
        self.at += count
        return count


def _holds(chunk: Any, at: tuple[int, ...]) -> bool:
    places = zip(at, chunk.offsets, chunk.sizes, strict=False)
    return all(first <= i < first + count for i, first, count in places)
