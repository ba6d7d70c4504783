"""Replacements of torch's functions that load torch_dist checkpoints; these run no code.

torch unpickles `.metadata`, and every entry that is not a tensor, with Python's unpickler, which
calls whatever function a pickle names. A check before the load is not enough: the files could
change after it, and every rank reads them itself. A run therefore puts the functions of this file
in place of torch's (training/hooks.py). Megatron's readers call torch's.
"""

from __future__ import annotations

import io
from pathlib import Path

# Importing Megatron registers the classes that its checkpoints hold as safe with torch.
import megatron.core  # noqa: F401
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_mlra.checkpoint.files import torch_dist_index
from megatron_mlra.checkpoint.files.torch_file import (
    TorchFileError,
    check_entry,
    load_entry,
)
from megatron_mlra.description.model import CheckpointError

_slice_file = FileSystemReader._slice_file


def read_metadata(self: FileSystemReader, *_, **named) -> Metadata:
    """FileSystemReader.read_metadata, without running code.

    Raises:
        CheckpointError: the index names code, or is damaged.
    """
    file = Path(self._get_metadata_path(named.get("rank")))
    index = torch_dist_index.read_metadata(file.parent, file.name)
    if getattr(index, "storage_meta", None) is None:
        index.storage_meta = StorageMeta()
    index.storage_meta.load_id = self.load_id
    return index


def checkpoint_format(folder: str | Path, *_) -> str:
    """Megatron's `_get_checkpoint_format`: torch_dist, the only format whose files are checked.

    Raises:
        CheckpointError: the folder has another format, or files of another one.
    """
    torch_dist_index.check_format(Path(folder))
    return "torch_dist"


def slice_file(self: FileSystemReader, file, info):
    """FileSystemReader._slice_file: the part of a file with one entry, checked before torch
    allocates the tensor whose size the entry states.

    Raises:
        CheckpointError: the entry names code, or has fewer bytes than it states.
    """
    part = _slice_file(self, file, info)
    try:
        check_entry(part, info.length)
    except TorchFileError as error:
        where = f"{info.relative_path} at byte {info.offset:,}"
        raise CheckpointError(f"checkpoint {self.path}: the entry in {where}: {error}") from None
    part.seek(0)
    return part


def load_bytes(self: DefaultLoadPlanner, read_item, value: io.BytesIO) -> None:
    """DefaultLoadPlanner.load_bytes, without running code.

    Raises:
        CheckpointError: the entry names code, or is damaged.
    """
    name = read_item.dest_index.fqn
    try:
        loaded = load_entry(value, value.getbuffer().nbytes)
    except TorchFileError as error:
        raise CheckpointError(f"checkpoint entry {name:.100}: {error}") from None
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded
