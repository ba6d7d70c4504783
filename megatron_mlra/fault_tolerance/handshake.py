"""All ranks of a run meet before any does anything: same code, arguments, data and save folder.

The ranks talk through the store that the launcher provides, not by collectives: a collective among
ranks that disagree about sizes hangs or fails without a name. The order:

1. every rank leaves the name of its host, rank 0 its fingerprint;
2. every other rank answers what differs in its own fingerprint;
3. rank 0 takes the lock of the save folder and writes a probe there;
4. every other rank answers whether it sees the probe;
5. rank 0 gives its verdict: the names of all hosts, or the one line with which all ranks end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

from megatron_mlra.fault_tolerance import shared_folder

Fingerprint = dict[str, dict[str, str]]
"""Fingerprints by kind ('code', 'data', ...), those first whose differences explain the others."""

_SLACK = 90.0
"""Seconds for which ranks wait longer for rank 0 than rank 0 for them, so that rank 0's line, which
names who is missing, comes first; a lock may be waited for in between."""


@dataclass
class World:
    """The ranks that met."""

    hosts: list[str]
    """Name of each rank's host."""
    store: Store | None = None
    """For torch.distributed; None for one process alone."""


def meet(
    rank: int,
    world_size: int,
    fingerprint: Fingerprint,
    *,
    seconds: float,
    save: str | None = None,
    enter: Callable[[], None] = lambda: None,
) -> World:
    """Meet the other ranks; every rank returns, or every rank raises the same line.

    Args:
        fingerprint: of this rank. A kind that only some ranks give is compared among those.
        seconds: how long to wait for ranks that do not come.
        save: folder that all ranks must see, if any.
        enter: called on rank 0 once all ranks are there and agree, before the folder is looked
            at; what it raises ends all ranks.

    Raises:
        ValueError: one line that names the rank, its host and what is wrong.
    """
    host = socket.gethostname()
    if world_size == 1:
        enter()
        return World([host])
    talk = _Talk(rank, world_size, seconds)
    talk.leave(f"host/{rank}", host)
    hosts = _follow(talk, fingerprint, save) if rank else _lead(talk, fingerprint, save, enter)
    return World(hosts, PrefixStore(_key("world"), talk.store))


def _lead(
    talk: _Talk, fingerprint: Fingerprint, save: str | None, enter: Callable[[], None]
) -> list[str]:
    """Rank 0."""
    hosts: dict[int, str] = {}
    try:
        hosts = talk.collect("host", {})
        talk.leave("reference", fingerprint)
        _check_same(talk.collect("different", hosts), hosts)
        enter()
        with shared_folder.probe(save) as name:
            talk.leave("probe", name)
            _check_shared(talk.collect("sees", hosts), hosts, save)
    except Exception as error:
        line = " ".join(str(error).split()) or type(error).__name__
        for key in ("reference", "probe", "verdict"):
            talk.leave(key, None, refusal=line)
        talk.wait_for_readers()
        raise
    names = [hosts[rank] for rank in sorted(hosts)]
    talk.leave("verdict", names)
    return names


def _follow(talk: _Talk, fingerprint: Fingerprint, save: str | None) -> list[str]:
    """Any other rank."""
    different: list[tuple[str, str, str]] = []
    for kind, here in talk.ask("reference").items():
        if kind in fingerprint and not different:
            different = _differences(here, fingerprint[kind])
    talk.leave(f"different/{talk.rank}", different)
    name = talk.ask("probe")
    talk.leave(f"sees/{talk.rank}", name is None or shared_folder.sees(save, name))
    return talk.ask("verdict")


def _check_same(answers: dict[int, list], hosts: dict[int, str]) -> None:
    """Refuse ranks that differ from rank 0; names the first."""
    differing = {rank: answers[rank] for rank in sorted(answers) if answers[rank]}
    if not differing:
        return
    rank, different = next(iter(differing.items()))
    shown = [
        f"{name}: {there:.200}, where rank 0 has {here:.200}" for name, here, there in different[:3]
    ]
    if more := len(different) - len(shown):
        shown.append(f"and in {more} more")
    if others := len(differing) - 1:
        shown.append(f"{others} other rank{'s differ' if others > 1 else ' differs'} too")
    raise ValueError(
        f"rank {rank} (host {hosts[rank]}) differs from rank 0 (host {hosts[0]}) in"
        f" {'; '.join(shown)}; start every host with the same command, code and data"
    )


def _check_shared(answers: dict[int, bool], hosts: dict[int, str], save: str | None) -> None:
    """Refuse a folder that not all ranks see."""
    if blind := [rank for rank in sorted(answers) if not answers[rank]]:
        do = "does" if len(blind) == 1 else "do"
        raise ValueError(
            f"--save {save} is not shared: {_named(blind, hosts)} {do} not see what rank 0 (host"
            f" {hosts[0]}) writes there; use a folder that all hosts see"
        )


def _named(ranks: list[int], hosts: dict[int, str]) -> str:
    """Ranks with their hosts, in a few words: `rank 8 (host node2), ranks 16 to 23 (host node3)`.

    Ranks that never said where they run are named by their node's number, as the launcher counts.
    """
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    groups: dict[str, list[int]] = {}
    for rank in ranks:
        where = f"host {hosts[rank]}" if rank in hosts else f"node number {rank // per_node}"
        groups.setdefault(where, []).append(rank)
    parts = [
        f"rank{'s' if len(group) > 1 else ''} {_numbers(group)} ({where})"
        for where, group in list(groups.items())[:8]
    ]
    more = len(groups) - len(parts)
    return ", ".join(parts) + (f" and {more} more hosts" if more > 0 else "")


def _numbers(ranks: list[int]) -> str:
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")


def _differences(here: dict[str, str], there: dict[str, str]) -> list[tuple[str, str, str]]:
    """What differs between two fingerprints: what it is, its value here and there."""
    names = [*here, *(name for name in there if name not in here)]
    return [
        (name, here.get(name, "missing"), there.get(name, "missing"))
        for name in names
        if here.get(name) != there.get(name)
    ]


class _Talk:
    """What the ranks say to each other, by keys of the launcher's store."""

    def __init__(self, rank: int, world_size: int, seconds: float) -> None:
        self.rank, self.world_size = rank, world_size
        self.deadline = time.monotonic() + seconds
        self.seconds = seconds
        self.absent: set[int] = set()
        # As torch's own rendezvous makes it, but without waiting for all ranks: those that do not
        # come are to be named.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size=None,
            is_master=rank == 0 and not agent,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=not agent,
        )

    def leave(self, key: str, what: Any, refusal: str = "") -> None:
        """Leave something for the others: a value, or the line that ends them."""
        self.store.set(_key(key), zlib.compress(json.dumps([what, refusal]).encode(), 1))

    def _read(self, key: str) -> Any:
        what, refusal = json.loads(zlib.decompress(self.store.get(_key(key))))
        if refusal:
            # Rank 0 may host the store, and ends once all have read this.
            self.leave(f"read/{self.rank}", True)
            raise ValueError(refusal)
        return what

    def ask(self, key: str) -> Any:
        """Wait for what rank 0 leaves.

        Raises:
            ValueError: rank 0 refuses, or leaves nothing.
        """
        left = timedelta(seconds=max(1.0, self.deadline - time.monotonic()) + _SLACK)
        try:
            self.store.wait([_key(key)], left)
            return self._read(key)
        except RuntimeError as error:
            late = "imed out" in str(error) or "timeout" in str(error)
            how = f"did not go on within {left.total_seconds():.0f} s" if late else "has ended"
            raise ValueError(
                f"rank 0 (at {os.environ['MASTER_ADDR']}) {how}; its own error says why"
            ) from error

    def collect(self, kind: str, hosts: dict[int, str]) -> dict[int, Any]:
        """What every rank left; rank 0's own answer is not asked for.

        Raises:
            ValueError: names the ranks that left nothing in time.
        """
        ranks = [rank for rank in range(self.world_size) if rank or kind == "host"]
        keys = [_key(f"{kind}/{rank}") for rank in ranks]
        try:
            # To look at a folder takes some time, however long rank 0 waited for its lock.
            least = 2 * shared_folder.PATIENCE if kind == "sees" else 1.0
            left = max(least, self.deadline - time.monotonic())
            self.store.wait(keys, timedelta(seconds=left))
        except RuntimeError:
            there = [rank for rank, key in zip(ranks, keys, strict=True) if self.store.check([key])]
            missing = [rank for rank in ranks if rank not in there]
            self.absent.update(missing)
            known = {rank: self._read(f"host/{rank}") for rank in there} | hosts
            raise ValueError(
                f"{_named(missing, known)} did not come within {self.seconds:.0f} s"
                " (--distributed-timeout-minutes); those that did:"
                f" {_named(there or [0], known)}; look at the output on the hosts that are missing"
            ) from None
        return {rank: self._read(f"{kind}/{rank}") for rank in ranks}

    def wait_for_readers(self) -> None:
        """After a refusal: until all ranks that are there have read it."""
        there = set(range(1, self.world_size)) - self.absent
        with contextlib.suppress(RuntimeError):
            self.store.wait([_key(f"read/{rank}") for rank in there], timedelta(seconds=10))


def _key(name: str) -> str:
    # The launcher's store may still hold what ranks said before a restart.
    return f"handshake/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
