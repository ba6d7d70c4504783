"""Checksums of a checkpoint's files: each writer hashes its files, all ranks compare at load.

The manifest is Megatron's `integrity.json` (SHA-256 of every file), so that Megatron's own
`--verify-integrity` reads it too. Megatron has one rank hash the whole checkpoint while the others
wait. Here each writer hashes its own files after writing them, and each rank compares a share.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_mlra.checkpoint.files import manifest
from megatron_mlra.checkpoint.files.manifest import MANIFEST
from megatron_mlra.command_line.parser import aside, one_line
from megatron_mlra.command_line.plain_file import sha256
from megatron_mlra.description.model import CheckpointError

DIGEST = ".sha256"
"""Suffix of the digest that a writer leaves beside its file until the manifest is written."""

# Megatron's functions, which `preload_tensors` and `write_and_hash` replace (training/hooks.py). A
# persistent writer runs in another interpreter, which imports `write_and_hash` by its name.
_preload = FileSystemWriterAsync.preload_tensors
_write = FileSystemWriterAsync.write_preloaded_data_multithread


def preload_tensors(write_buckets: list, non_blocking: bool = True) -> list:
    """Megatron's `preload_tensors`, which copies tensors while training waits. Megatron does not
    copy tensors on the CPU: an asynchronous writer would save values of a later moment."""
    if multiprocessing.parent_process() is not None:
        write_buckets = [
            (
                file,
                key,
                (
                    data,
                    [
                        (item, tensor.clone() if tensor.is_cpu else tensor)
                        for item, tensor in tensors
                    ],
                ),
            )
            for file, key, (data, tensors) in write_buckets
        ]
    return _preload(write_buckets, non_blocking)


def write_and_hash(transforms, use_msc, rank, write_buckets, results_queue) -> None:
    """Megatron's `write_preloaded_data_multithread` for one rank's files, then their digests."""
    paths = [Path(bucket[0]) for bucket in write_buckets]
    for path in paths:
        _digest(path).unlink(missing_ok=True)
    _write(transforms, use_msc, rank, write_buckets, results_queue)
    with ThreadPoolExecutor(len(paths)) as threads:
        list(threads.map(_leave_digest, paths))


def _digest(path: Path) -> Path:
    return path.with_name(path.name + DIGEST)


def _leave_digest(path: Path) -> None:
    # The failed write of a file has been reported; `write_manifest` computes a missing digest.
    with contextlib.suppress(OSError):
        _digest(path).write_text(sha256(path))


def write_manifest(folder: str | Path) -> None:
    """Write the manifest from the writers' digests and the hashes of small files without one."""
    folder = Path(folder)
    files, digests = {}, []
    for path in sorted(folder.iterdir()):
        if path.suffix == DIGEST:
            digests.append(path)
        elif path.is_file() and path.name != MANIFEST:
            digest = _digest(path)
            files[path.name] = digest.read_text() if digest.exists() else sha256(path)
    partial = aside(folder / f".{MANIFEST}.tmp")
    with open(partial, "x") as file:
        json.dump({"algorithm": "sha256", "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / MANIFEST)
    for path in digests:
        path.unlink()


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the first file that differs from its checksum; None if none does, or the
    checkpoint has no manifest. Compared are the files number `part`, `part + parts`, ..."""
    try:
        files = manifest.entries(folder)
    except CheckpointError as error:
        return str(error)
    if files is None:
        return None
    # A .distcp file that is not listed is in no rank's share; the first rank refuses it.
    unlisted = {path.name for path in folder.glob("*.distcp")} - files.keys() if not part else set()
    return manifest.damage(folder, [*sorted(files)[part::parts], *unlisted])


def with_type(error: Exception) -> str:
    """An error in one line, with its type unless it is a ValueError with a message."""
    said = one_line(error)
    return said if isinstance(error, ValueError) and said else f"{type(error).__name__}: {said}"


def damage_anywhere(folder: Path) -> str | None:
    """`damage` of the whole checkpoint, whose files are divided among all ranks. All ranks return
    the same, even if one of them fails."""
    ranks = torch.distributed.get_world_size()
    found: list[str | None] = [None] * ranks
    try:
        mine = damage(folder, torch.distributed.get_rank(), ranks)
    except Exception as error:
        # If a rank raised here, the others would wait for it in all_gather.
        mine = f"its files cannot be compared ({with_type(error)})"
    torch.distributed.all_gather_object(found, mine)
    return next((what for what in found if what), None)
