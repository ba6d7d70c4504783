"""Reading pickles from checkpoints without running what is in them.

A pickle names functions to call. Here the few that checkpoints are made of keep their meaning, and
every other name becomes an inert object that remembers nothing: no file can run code.
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

_KNOWN: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
}
for _name in (
    "Metadata",
    "MetadataIndex",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
):
    _KNOWN["torch.distributed.checkpoint.metadata", _name] = getattr(metadata, _name)


class Inert:
    """Stands for an object of a class that checkpoints do not need."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return self

    def append(self, _: Any) -> None:
        """Lists of an unknown class lose their items."""

    def extend(self, _: Any) -> None:
        """As append."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class Unpickler(pickle.Unpickler):
    """Knows the classes checkpoints are made of; `torch.load` takes this module as its pickle."""

    def find_class(self, module: str, name: str) -> Any:
        """The known class, or Inert."""
        known = _KNOWN.get((module, name))
        if known is None and module == "torch":
            dtype = getattr(torch, name, None)
            known = dtype if isinstance(dtype, torch.dtype) else None
        return Inert if known is None else known


def load(file: Any, **_: Any) -> Any:
    """pickle.load, running nothing."""
    return Unpickler(file).load()


def load_torch(data: bytes | Path) -> Any:
    """torch.load of plain values and Megatron's arguments; objects of other classes are Inert."""
    import megatron_mlra.checkpoint.megatron.safe_pickle as this_module

    source = io.BytesIO(data) if isinstance(data, bytes) else data
    return torch.load(source, map_location="cpu", weights_only=False, pickle_module=this_module)
