"""Checksums of a checkpoint's files: taken by whoever writes a file, checked by all ranks at load.

The manifest is Megatron's `integrity.json` (SHA-256 of every file), so that Megatron's own
`--verify-integrity` reads it too. Megatron has one rank hash the whole checkpoint while the others
wait; here each writer hashes its own file behind its own write, and each rank checks a share.
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
from megatron_mlra.checkpoint.files.manifest import MANIFEST, sha256
from megatron_mlra.command_line.parser import aside, one_line
from megatron_mlra.description.model import CheckpointError
from megatron_mlra.fault_tolerance.writer_process import end_with_parent

DIGEST = ".sha256"
"""Suffix of what a writer leaves beside its file until the manifest is written."""

# Megatron's own, which `preload_tensors` and `write_and_hash` replace (training/hooks.py). A
# persistent writer is another interpreter, which finds `write_and_hash` by its name.
_preload = FileSystemWriterAsync.preload_tensors
_write = FileSystemWriterAsync.write_preloaded_data_multithread


def preload_tensors(write_buckets: list, non_blocking: bool = True) -> list:
    """Megatron's copy of what is to be written, made while training waits. Of tensors that are on
    the CPU it makes none, so that an asynchronous writer would save them half a step later."""
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
    """Megatron's writer of one rank's files, then their digests."""
    if multiprocessing.parent_process() is not None:
        # An asynchronous writer whose rank is killed must not go on: the restarted job may already
        # be saving the same step into the same files.
        end_with_parent()
    paths = [Path(bucket[0]) for bucket in write_buckets]
    for path in paths:
        _digest(path).unlink(missing_ok=True)
    _write(transforms, use_msc, rank, write_buckets, results_queue)
    with ThreadPoolExecutor(len(paths)) as threads:
        list(threads.map(_leave_digest, paths))


def _digest(path: Path) -> Path:
    return path.with_name(path.name + DIGEST)


def _leave_digest(path: Path) -> None:
    # A file that could not be written has been reported; a missing digest, whoever writes the
    # manifest makes up for.
    with contextlib.suppress(OSError):
        _digest(path).write_text(sha256(path))


def write_manifest(folder: str | Path) -> None:
    """Gather the writers' digests into the manifest, and hash the small files that have none."""
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
    """The first file that is not what was saved, of every `parts`-th from number `part` on.

    Returns:
        what is wrong with it, or None. A checkpoint without a manifest has nothing to compare with.
    """
    try:
        files = manifest.entries(folder)
    except CheckpointError as error:
        return str(error)
    if files is None:
        return None
    # What is read and not listed is nobody's share; the first rank names it.
    unlisted = {path.name for path in folder.glob("*.distcp")} - files.keys() if not part else set()
    return manifest.damage(folder, [*sorted(files)[part::parts], *unlisted])


def with_type(error: Exception) -> str:
    """An error in one line, and its type where the text alone does not say what happened."""
    said = one_line(error)
    return said if isinstance(error, ValueError) and said else f"{type(error).__name__}: {said}"


def damage_anywhere(folder: Path) -> str | None:
    """`damage` of the whole checkpoint, its files shared out among all ranks; the same on all,
    whatever happens on one."""
    ranks = torch.distributed.get_world_size()
    found: list[str | None] = [None] * ranks
    try:
        mine = damage(folder, torch.distributed.get_rank(), ranks)
    except Exception as error:
        # A rank that raised here would leave the others waiting for its part.
        mine = f"its files cannot be compared ({with_type(error)})"
    torch.distributed.all_gather_object(found, mine)
    return next((what for what in found if what), None)
