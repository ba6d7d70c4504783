"""Writes safetensors shards and their index tensor by tensor: memory holds one tensor.

The format: 8 bytes of header length, a JSON header of names, dtypes, shapes and byte ranges, then
the numbers, little-endian, in C order. The safetensors library itself needs all tensors of a file
in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megatron_mlra.description.model import CheckpointError

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
MAX_SHARD_BYTES = 5 * 10**9


def write_safetensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model.safetensors`, or shards and `model.safetensors.index.json`.

    Args:
        shapes: name -> shape of every tensor, in the order in which `tensors` yields them.
        dtypes: name -> dtype of each tensor.
        max_shard_bytes: most bytes of tensors in a file, unless one tensor alone has more.

    Raises:
        CheckpointError: `tensors` yields another name, shape or dtype, or too few.
    """
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, max_shard_bytes)
    files = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    source = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        with (folder / file).open("wb") as stream:
            stream.write(_header({name: shapes[name] for name in names}, dtypes))
            for name in names:
                found, tensor = next(source, (None, None))
                expected = (name, shapes[name], dtypes[name])
                if found is None or (found, tuple(tensor.shape), tensor.dtype) != expected:
                    raise CheckpointError(f"{found or 'nothing'} came where {name} is written")
                flat = tensor.detach().contiguous().view(-1)
                stream.write(memoryview(flat.view(torch.uint8).numpy()))
    if next(source, None) is not None:
        raise CheckpointError("more tensors came than are written")
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_index(folder / "model.safetensors.index.json", sum(sizes.values()), where)


def write_index(file: Path, total_bytes: int, files: Mapping[str, str]) -> None:
    """Write an index of shards (tensor name -> file name) in the format of transformers."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(files)}
    file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The tensor names of each file: at most `limit` bytes, unless one tensor alone is larger."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, more in sizes.items():
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards


def _header(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * dtypes[name].itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[dtypes[name]],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    # The numbers begin at a multiple of 8.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
