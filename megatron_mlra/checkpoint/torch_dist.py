"""The torch_dist files of a Megatron checkpoint, read without a process group.

Every entry of `.metadata` says which bytes of which file hold which block of which tensor.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_mlra.checkpoint import safe_pickle
from megatron_mlra.checkpoint.description import CheckpointError

COMMON_KEY = "common_state/shard_0_1"
COMMON_FILE = "common.pt"


class TorchDistFolder:
    """An `iter_*` folder: sizes without reading, blocks of tensors on demand.

    Raises:
        CheckpointError: the folder is incomplete; names the missing or short file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = read_metadata(path)
        check_files(path, self.metadata)
        if any(info.transform_descriptors for info in self.metadata.storage_data.values()):
            raise CheckpointError(f"checkpoint {path} is compressed, which is not supported")
        self.stored = {
            (index.fqn, tuple(index.offset or ())): info
            for index, info in self.metadata.storage_data.items()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every stored tensor, by stored name."""
        return {
            name: tuple(entry.size)
            for name, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a stored tensor."""
        return self.metadata.state_dict_metadata[name].properties.dtype

    def tensor(self, name: str, at: tuple[int, ...] = ()) -> torch.Tensor:
        """A stored tensor, or its part at these indices of its first dimensions (layer, expert).

        Raises:
            CheckpointError: a block of it is missing or cannot be read.
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
                value = torch.load(part, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self.path}: {name} in {info.relative_path} cannot be read"
                f" ({' '.join(str(error).split()):.200})"
            ) from None
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"checkpoint {self.path}: {name} is no tensor")
        return value

    def _bytes(self, info: Any) -> bytes:
        with open(self.path / info.relative_path, "rb") as file:
            file.seek(info.offset)
            return file.read(info.length)

    def raw(self, name: str) -> bytes:
        """The bytes of an entry that is no tensor."""
        return self._bytes(self.stored[name, ()])

    def common_state(self) -> dict[str, Any]:
        """Megatron's state that is no tensor: `args`, `iteration`, ...; unknown classes are inert.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        try:
            info = self.stored.get((COMMON_KEY, ()))
            if info is not None:
                state = safe_pickle.load_torch(self._bytes(info))
            else:
                state = safe_pickle.load_torch(self.path / COMMON_FILE)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self.path}: its arguments cannot be read"
                f" ({' '.join(str(error).split()):.200})"
            ) from None
        if isinstance(state, list) and len(state) == 1:
            state = state[0]
        if not isinstance(state, dict):
            raise CheckpointError(f"checkpoint {self.path}: its common state is no dictionary")
        return state


class _Part(io.RawIOBase):
    """A range of bytes of a file, as a file: torch.load then reads it without a second copy."""

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


def read_metadata(path: Path) -> Metadata:
    """A checkpoint's `.metadata`; nothing pickled in it is run.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    file = path / ".metadata"
    if not file.is_file():
        raise CheckpointError(f"checkpoint {path} is incomplete: it has no .metadata")
    try:
        with file.open("rb") as stream:
            metadata = safe_pickle.load(stream)
        tensors, stored = metadata.state_dict_metadata, metadata.storage_data
        sound = isinstance(tensors, dict) and isinstance(stored, dict)
        sound = sound and all(
            isinstance(index, MetadataIndex)
            and isinstance(info, _StorageInfo)
            and Path(info.relative_path).name == info.relative_path
            for index, info in stored.items()
        )
    except Exception as error:
        raise CheckpointError(f"checkpoint {path}: .metadata cannot be read ({error})") from None
    if not sound:
        raise CheckpointError(f"checkpoint {path}: .metadata is not a torch_dist checkpoint's")
    return metadata


def needed_files(metadata: Metadata) -> dict[str, int]:
    """Every file that the metadata refers to, and the bytes it must have at least."""
    needed: dict[str, int] = {}
    for item in metadata.storage_data.values():
        end = item.offset + item.length
        needed[item.relative_path] = max(end, needed.get(item.relative_path, 0))
    return needed


def check_files(path: Path, metadata: Metadata) -> None:
    """Check that every file the metadata refers to is there, at full length.

    Raises:
        CheckpointError: names the first missing or short file.
    """
    for name, size in sorted(needed_files(metadata).items()):
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} is incomplete: {name} is missing")
        if file.stat().st_size < size:
            raise CheckpointError(
                f"checkpoint {path} is truncated: {name} has {file.stat().st_size} of {size} bytes"
            )
