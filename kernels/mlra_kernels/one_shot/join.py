"""Maps the memory of the ranks of one host into each other, by torch's symmetric memory.

NVLink multicast is never used.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist

from mlra_kernels.one_shot.ops import launch
from mlra_kernels.one_shot.peers import Peers, box_words

FIRST_PATIENCE = 1 << 27
"""Looks for a peer's words in the first sums: a minute or more, for a peer that compiles."""


class NoPeers(RuntimeError):
    """The ranks cannot write each other's memory. All ranks raise it, with the same words."""


def join_peers(
    group: dist.ProcessGroup,
    rows: int,
    d: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Peers:
    """Map the boxes of all ranks of `group`, and sum twice to see that it works.

    A collective: all ranks call it with the same sizes. Sets TORCH_SYMM_MEM_DISABLE_MULTICAST in
    this process, so that torch makes no multicast object.

    Args:
        rows, d, dtype: see `Peers`.
        device: this rank's GPU.

    Raises:
        ValueError: a size or a dtype does not fit.
        NoPeers: the ranks are not GPUs of one host that can write each other's memory.
    """
    box_words(rows, d, dtype, dist.get_world_size(group))
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    peers = problem = None
    # Collectives of NCCL take the current GPU.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        _agree(group, _misfit(group, device))
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        try:
            peers = _mapped(group, rows, d, dtype, device)
            torch.cuda.synchronize()
        except Exception as error:  # The interface is young, and its errors have no common class.
            problem = _line(error)
        _agree(group, problem)  # Behind this line all boxes are zero.
        _agree(group, _wrong_sum(peers))
    return peers


def _mapped(
    group: dist.ProcessGroup, rows: int, d: int, dtype: torch.dtype, device: torch.device
) -> Peers:
    """This rank's box, zero, and the addresses of all."""
    import torch.distributed._symmetric_memory as symmetric

    words = box_words(rows, d, dtype, dist.get_world_size(group))
    box = symmetric.empty(words, dtype=torch.int64, device=device)
    handle = symmetric.rendezvous(box, group)
    box.zero_()
    rank = dist.get_rank(group)
    # The box may lie inside a larger allocation, at the same place on all ranks.
    offset = box.data_ptr() - handle.buffer_ptrs[rank]
    addresses = [address + offset for address in handle.buffer_ptrs]
    return Peers(rank, addresses, rows, d, dtype, device, (box, handle))


def _misfit(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why this rank cannot write its peers' memory, as far as that shows before trying."""
    try:
        host = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        host = socket.gethostname()
    index = device.index if device.type == "cuda" else None
    found: list[tuple[str, int | None]] = [("", None)] * dist.get_world_size(group)
    dist.all_gather_object(found, (host, index), group=group)
    if index is None:
        return f"the device is {device.type}, no GPU"
    if any(other != host for other, _ in found):
        return "the ranks are on several hosts"
    for rank, (_, other) in enumerate(found):
        # Equal numbers mean that each process sees GPUs of its own. Then mapping shows it.
        known = other is not None and other != index and other < torch.cuda.device_count()
        if known and not torch.cuda.can_device_access_peer(index, other):
            return f"its GPU cannot write the memory of rank {rank}'s"
    return None


def _wrong_sum(peers: Peers) -> str | None:
    """What goes wrong in two calls, one for each turn; None: nothing."""
    try:
        x = torch.full((peers.rows, peers.d), peers.rank + 1.0).to(peers.device, peers.dtype)
        expected = peers.world * (peers.world + 1) / 2 + 1
        for _ in range(2):
            ones = torch.ones_like(x)
            # A negative patience: no trap, which would end the process.
            total, _ = launch(x, ones, ones[0], 1e-6, peers, patience=-FIRST_PATIENCE)
            if not bool((total == expected).all()):
                return "a sum by the ranks' memory was wrong"
    except Exception as error:
        return _line(error)
    return None


def _agree(group: dist.ProcessGroup, problem: str | None) -> None:
    """Raise NoPeers on all ranks if any has a problem. All ranks wait for one another."""
    problems: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    for rank, said in enumerate(problems):
        if said is not None:
            raise NoPeers(f"rank {rank}: {said}")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
