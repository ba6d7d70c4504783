"""Rank 0 checks that the files of all ranks are complete before the tracker names a checkpoint.

Megatron writes its tracker file when rank 0 has written the index. It does not check the files of
other ranks. In a folder that is not shared, or on a lost mount, the tracker would then name an
incomplete checkpoint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_mlra.checkpoint.files.torch_dist_index import needed_files, read_metadata
from megatron_mlra.description.model import CheckpointError
from megatron_mlra.fault_tolerance.shared_folder import comes_true

_WRITER = re.compile(r"__(\d+)_\d+\.distcp").fullmatch


def look_behind(
    finalize: Callable[..., None], hosts: list[str], successor: Callable[[], object]
) -> Callable[..., None]:
    """Megatron's `save_state_dict_async_finalize`, then rank 0's check of the files.

    Megatron writes the tracker after this function.

    Args:
        finalize: Megatron's function.
        hosts: name of each rank's host.
        successor: returns the other run that owns the folder now, or None.
    """

    def finalize_and_look(storage_writer, global_metadata, dist_wrapper) -> None:
        finalize(storage_writer, global_metadata, dist_wrapper)
        why = [None]
        if dist_wrapper.is_coordinator:
            try:
                if other := successor():
                    why = [f"the folder belongs to another run now ({other})"]
                else:
                    why = [missing(Path(storage_writer.path), hosts)]
            except OSError as error:
                why = [str(error)]
        torch.distributed.broadcast_object_list(
            why, src=dist_wrapper.coordinator_rank, group=dist_wrapper.group
        )
        if why[0] is not None:
            raise RuntimeError(why[0])

    return finalize_and_look


def missing(folder: Path, hosts: list[str]) -> str | None:
    """The first file of a new checkpoint that this host does not see within `PATIENCE`.

    Args:
        hosts: name of each rank's host.

    Returns:
        A line that names the file and the host that wrote it, or None.
    """
    try:
        needed = needed_files(read_metadata(folder))
    except CheckpointError as error:
        return str(error)
    left: dict[str, str] = {}

    def all_there() -> bool:
        left.clear()
        for name, size in needed.items():
            try:
                # Opening a file asks the file server for its size; stat may use a cache.
                with open(folder / name, "rb") as file:
                    there = os.fstat(file.fileno()).st_size
            except OSError as error:
                left[name] = error.strerror
            else:
                if there < size:
                    left[name] = f"{there:,} of {size:,} bytes"
        return not left

    if comes_true(all_there, folder):
        return None
    name = min(left)
    writer = _WRITER(name)
    rank = int(writer[1]) if writer else 0
    host = hosts[rank] if rank < len(hosts) else "?"
    return (
        f"host {hosts[0]} does not see what other ranks wrote: {name} of rank {rank} (host {host}):"
        f" {left[name]}{f', and {len(left) - 1} more files' if len(left) > 1 else ''}; is the"
        " folder shared by all hosts?"
    )
