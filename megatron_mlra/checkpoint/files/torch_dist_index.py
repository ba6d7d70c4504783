"""The index of a torch_dist checkpoint (`.metadata`), read and compared with the files beside it.

The index maps each block of each tensor to a range of bytes in a file. Loaders first unpickle the
index and the entries that are not tensors; both are checked here.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mlra.checkpoint.files import safe_pickle
from megatron_mlra.checkpoint.files.inside import inside
from megatron_mlra.checkpoint.files.torch_file import (
    ForbiddenCode,
    TorchFileError,
    read_extra_state,
    read_object,
)
from megatron_mlra.checkpoint.files.tracker import FORMAT_FILE
from megatron_mlra.command_line.foreign_text import read_json
from megatron_mlra.description.model import CheckpointError

INDEX = ".metadata"
COMMON_FILE = "common.pt"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
"""Content of `metadata.json`, by which Megatron recognises the format of a folder."""
INDEX_BYTES = 256 << 20
"""Most bytes of an index. It may also not exceed the files beside it by more than 1 MiB."""
OBJECT_BYTES = 256 << 20
"""Most bytes of an entry that is not a tensor."""
_TENSOR_DIMS = 64


class ForbiddenNames(CheckpointError):
    """A checkpoint names code; the message lists the names and their places."""


def read_metadata(folder: Path, name: str = INDEX) -> Metadata:
    """A checkpoint's index, unpickled without running code, and the type of every field checked.

    Raises:
        ForbiddenNames: the index names code.
        CheckpointError: the index is missing, damaged or too large.
    """
    file = inside(folder, name)
    if not file.is_file():
        raise CheckpointError(f"checkpoint {folder} is incomplete: it has no {name}")
    try:
        size = file.stat().st_size
        beside = sum(p.stat().st_size for p in folder.iterdir() if p.is_file() and p != file)
        most = min(INDEX_BYTES, beside + (1 << 20))
        if size > most:
            raise CheckpointError(
                f"checkpoint {folder}: {name} has {size:,} bytes, more than the files it describes"
                f" can need ({most:,})"
            )
        found = safe_pickle.load(file.read_bytes())
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder}: {name} cannot be read ({error})") from None
    if found.refused:
        raise ForbiddenNames(_forbidden(folder, {name: found.refused}))
    wrong = _misfit(found.value)
    if wrong:
        raise CheckpointError(
            f"checkpoint {folder}: {name} is not a torch_dist checkpoint's ({wrong})"
        )
    return found.value


def check_format(folder: Path) -> None:
    """Check that Megatron, too, would read the folder by its index. Without `metadata.json` it
    would read files of its older format, which no index lists.

    Raises:
        CheckpointError: `metadata.json` is missing or names another format, or there are files of
            the older format.
    """
    file = inside(folder, FORMAT_FILE)
    try:
        older = sorted(name for name in os.listdir(folder) if name.startswith("mp_rank_"))
        named = read_json(file) if file.is_file() else None
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if older:
        raise CheckpointError(
            f"checkpoint {folder} also holds {older[0]!r:.80}, of Megatron's older format, which is"
            " not read; remove it, or use another copy"
        )
    if named is None:
        raise CheckpointError(
            f"checkpoint {folder} is incomplete: it has no {FORMAT_FILE}; use another copy or step"
        )
    if not isinstance(named, dict) or any(named.get(key) != FORMAT[key] for key in FORMAT):
        raise CheckpointError(
            f"checkpoint {folder}: {FORMAT_FILE} names another format than torch_dist 1; save it"
            " with --ckpt-format torch_dist"
        )


def _misfit(index: object) -> str | None:
    """The first field of an index that has the wrong type, or None."""
    if not isinstance(index, Metadata):
        return "no Metadata"
    entries = getattr(index, "state_dict_metadata", None)
    stored = getattr(index, "storage_data", None)
    if type(entries) is not dict or type(stored) is not dict:
        return "no entries"
    for name, entry in entries.items():
        if type(name) is not str:
            return "an entry without a name"
        if type(entry) is BytesStorageMetadata:
            continue
        if type(entry) is not TensorStorageMetadata:
            return f"{name:.100} is neither a tensor nor bytes"
        parts = vars(entry)
        properties, chunks = parts.get("properties"), parts.get("chunks")
        if (
            not _is_size(parts.get("size"))
            or type(properties) is not TensorProperties
            or type(properties.dtype) is not torch.dtype
            or type(chunks) is not list
            or not all(_is_chunk(chunk, len(parts["size"])) for chunk in chunks)
        ):
            return f"{name:.100} has no size, dtype or blocks"
    for at, info in stored.items():
        if type(at) is not MetadataIndex or type(info) is not _StorageInfo:
            return "a block without a place"
        key, place = vars(at), vars(info)
        file = place.get("relative_path")
        if type(key.get("fqn")) is not str or key["fqn"] not in entries:
            return "a block of no entry"
        if not (key.get("offset") is None or _is_size(key["offset"])):
            return f"a block of {key['fqn']:.100} at no offset"
        if type(file) is not str or Path(file).name != file or "\0" in file:
            return f"a block of {key['fqn']:.100} outside the folder"
        if not _are_counts((place.get("offset"), place.get("length"))):
            return f"a block of {key['fqn']:.100} of no length"
    return None


def _are_counts(values: Iterable[object]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _is_size(value: object) -> bool:
    """Whether the value is a tensor's size of fewer than 2^62 numbers."""
    return (
        isinstance(value, tuple)
        and len(value) <= _TENSOR_DIMS
        and _are_counts(value)
        and math.prod(value) < 1 << 62
    )


def _is_chunk(chunk: object, dims: int) -> bool:
    if type(chunk) is not ChunkStorageMetadata:
        return False
    sizes = [vars(chunk).get(name) for name in ("offsets", "sizes")]
    return all(_is_size(size) and len(size) == dims for size in sizes)


def check_files(folder: Path, index: Metadata) -> None:
    """Check that every file of the index exists at full length, that no two blocks share bytes, and
    that the blocks of each tensor have at least as many bytes as its numbers need.

    Raises:
        CheckpointError: names the first file that is missing or short, or the first wrong entry.
    """
    places = sorted(
        ((info.relative_path, info.offset, info.length, at.fqn) for at, info in _blocks(index)),
    )
    needed: dict[str, int] = {}
    stored: dict[str, int] = {}
    for file, start, length, name in places:
        if start < needed.get(file, 0) or not length:
            raise CheckpointError(
                f"checkpoint {folder}: .metadata gives {name:.100} bytes of {file:.100} that are"
                " another's"
            )
        needed[file] = start + length
        stored[name] = stored.get(name, 0) + length
    for file, size in needed.items():
        path = inside(folder, file)
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder} is incomplete: {file} is missing")
        if path.stat().st_size < size:
            raise CheckpointError(
                f"checkpoint {folder} is truncated: {file} has {path.stat().st_size} of {size}"
                " bytes"
            )
    if any(info.transform_descriptors for _, info in _blocks(index)):
        raise CheckpointError(f"checkpoint {folder} is compressed, which is not supported")
    for name, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            size = math.prod(entry.size) * entry.properties.dtype.itemsize
            if size > stored.get(name, 0):
                raise CheckpointError(
                    f"checkpoint {folder}: {name:.100} is {list(entry.size)}, {size:,} bytes, and"
                    f" {stored.get(name, 0):,} bytes are stored"
                )


def needed_files(index: Metadata) -> dict[str, int]:
    """File -> least number of bytes that it must have, for every file of an index."""
    needed: dict[str, int] = {}
    for _, info in _blocks(index):
        end = info.offset + info.length
        needed[info.relative_path] = max(end, needed.get(info.relative_path, 0))
    return needed


def _blocks(index: Metadata) -> Iterable[tuple[MetadataIndex, _StorageInfo]]:
    return index.storage_data.items()


def check_objects(folder: Path, index: Metadata) -> None:
    """Check every entry that a loader unpickles: all entries that are not tensors.

    Raises:
        ForbiddenNames: entries name code; lists the names and the entries.
        CheckpointError: an entry cannot be read.
    """
    forbidden: dict[str, tuple[str, ...]] = {}
    common = inside(folder, COMMON_FILE)
    if common.is_file():
        forbidden[COMMON_FILE] = _refused(folder, COMMON_FILE, common, 0, common.stat().st_size)
    for at, info in _blocks(index):
        if not isinstance(index.state_dict_metadata[at.fqn], TensorStorageMetadata):
            file = inside(folder, info.relative_path)
            forbidden[at.fqn] = _refused(folder, at.fqn, file, info.offset, info.length)
    forbidden = {name: refused for name, refused in forbidden.items() if refused}
    if forbidden:
        raise ForbiddenNames(_forbidden(folder, forbidden))


def _refused(folder: Path, name: str, file: Path, start: int, length: int) -> tuple[str, ...]:
    """The names of code in one entry."""
    try:
        if length > OBJECT_BYTES:
            raise TorchFileError(f"{length:,} bytes, of at most {OBJECT_BYTES:,}")
        with file.open("rb") as opened:
            opened.seek(start)
            entry = io.BytesIO(opened.read(length))
        if "._extra_state" in name:
            return read_extra_state(entry, length)
        return read_object(entry, length).refused
    except ForbiddenCode as error:
        return (f"({error})",)
    except (OSError, TorchFileError) as error:
        where = name if name == file.name else f"{name:.100} in {file.name}"
        raise CheckpointError(f"checkpoint {folder}: {where} cannot be read ({error})") from None


def _forbidden(folder: Path, names: dict[str, tuple[str, ...]]) -> str:
    where = "; ".join(f"{safe_pickle.shown(found)} in {at:.100}" for at, found in names.items())
    return (
        f"checkpoint {folder} holds code, which is not run: {where:.2000}; no checkpoint has these"
        " names, so ask who made it"
    )
