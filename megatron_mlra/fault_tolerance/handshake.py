"""The handshake of all ranks before they begin: same code, arguments, data and save folder.

Runs of training begin with it, and commands that run a model on several ranks. The ranks exchange
messages through the launcher's store, not by collectives: a collective among ranks that disagree
about sizes hangs, or fails without naming a rank. The order:

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
"""Kind ('code', 'data', ...) -> fingerprint. Kinds whose differences explain others come first."""

_SLACK = 90.0
"""Seconds by which the other ranks wait longer than rank 0. The line of rank 0, which names the
missing ranks, then comes first. Rank 0 may also have to wait for the lock."""


@dataclass
class World:
    """The ranks that met."""

    hosts: list[str]
    """Name of each rank's host."""
    store: Store | None = None
    """Store for torch.distributed; None if there is one rank."""


def meet(
    rank: int,
    world_size: int,
    fingerprint: Fingerprint,
    *,
    seconds: float,
    limit: str = "--distributed-timeout-minutes",
    save: str | None = None,
    enter: Callable[[], None] = lambda: None,
) -> World:
    """Meet the other ranks; every rank returns, or every rank raises the same line.

    Args:
        fingerprint: of this rank. Kinds that this rank or rank 0 lacks are not compared.
        seconds: how long to wait for ranks that do not come.
        limit: the flag that sets `seconds`, for the message; empty: none does.
        save: folder that all ranks must see, if any.
        enter: called on rank 0 when all ranks are there and agree, before the check of the folder.
            An error that it raises ends all ranks.

    Raises:
        ValueError: one line that names the rank, its host and what is wrong.
    """
    host = socket.gethostname()
    if world_size == 1:
        enter()
        return World([host])
    talk = _Talk(rank, world_size, seconds, limit)
    talk.leave(f"host/{rank}", host)
    hosts = _follow(talk, fingerprint, save) if rank else _lead(talk, fingerprint, save, enter)
    return World(hosts, PrefixStore(_key("world"), talk.store))


def _lead(
    talk: _Talk, fingerprint: Fingerprint, save: str | None, enter: Callable[[], None]
) -> list[str]:
    """The part of rank 0; returns the host of each rank."""
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
    """The part of any other rank; returns the host of each rank."""
    different: list[tuple[str, str, str]] = []
    for kind, here in talk.ask("reference").items():
        if kind in fingerprint and not different:
            different = _differences(here, fingerprint[kind])
    talk.leave(f"different/{talk.rank}", different)
    name = talk.ask("probe")
    talk.leave(f"sees/{talk.rank}", name is None or shared_folder.sees(save, name))
    return talk.ask("verdict")


def _check_same(answers: dict[int, list], hosts: dict[int, str]) -> None:
    """Refuse ranks that differ from rank 0.

    Raises:
        ValueError: names the first such rank and its differences.
    """
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
    """Refuse a folder in which some rank does not see the probe.

    Raises:
        ValueError: names these ranks.
    """
    if blind := [rank for rank in sorted(answers) if not answers[rank]]:
        do = "does" if len(blind) == 1 else "do"
        raise ValueError(
            f"--save {save} is not shared: {_named(blind, hosts)} {do} not see what rank 0 (host"
            f" {hosts[0]}) writes there; use a folder that all hosts see"
        )


def _named(ranks: list[int], hosts: dict[int, str]) -> str:
    """Ranks with their hosts for a message: `rank 8 (host node2), ranks 16 to 23 (host node3)`.

    Ranks whose host is unknown have the number of their node instead.
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
    """(name, value here, value there) of all differences between two fingerprints."""
    names = [*here, *(name for name in there if name not in here)]
    return [
        (name, here.get(name, "missing"), there.get(name, "missing"))
        for name in names
        if here.get(name) != there.get(name)
    ]


class _Talk:
    """Messages between the ranks, as keys of the launcher's store."""

    def __init__(self, rank: int, world_size: int, seconds: float, limit: str) -> None:
        self.rank, self.world_size = rank, world_size
        self.limit = f" ({limit})" if limit else ""
        self.deadline = time.monotonic() + seconds
        self.seconds = seconds
        self.absent: set[int] = set()
        # As in torch's rendezvous, but without waiting for all ranks: `collect` names those that
        # do not come.
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
        """Set a key for the other ranks: to a value, or to the line that ends them."""
        self.store.set(_key(key), zlib.compress(json.dumps([what, refusal]).encode(), 1))

    def _read(self, key: str) -> Any:
        what, refusal = json.loads(zlib.decompress(self.store.get(_key(key))))
        if refusal:
            # Rank 0, which may host the store, ends when all ranks have read the line.
            self.leave(f"read/{self.rank}", True)
            raise ValueError(refusal)
        return what

    def ask(self, key: str) -> Any:
        """Wait for a value of rank 0.

        Raises:
            ValueError: rank 0 refuses, or does not set the key in time.
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
        """Rank -> its value of a kind. Rank 0 has a value only of the kind "host".

        Raises:
            ValueError: names the ranks that set no value in time.
        """
        ranks = [rank for rank in range(self.world_size) if rank or kind == "host"]
        keys = [_key(f"{kind}/{rank}") for rank in ranks]
        try:
            # Looking for the probe needs time even if rank 0 has used up the limit at the lock.
            least = 2 * shared_folder.PATIENCE if kind == "sees" else 1.0
            left = max(least, self.deadline - time.monotonic())
            self.store.wait(keys, timedelta(seconds=left))
        except RuntimeError:
            there = [rank for rank, key in zip(ranks, keys, strict=True) if self.store.check([key])]
            missing = [rank for rank in ranks if rank not in there]
            self.absent.update(missing)
            known = {rank: self._read(f"host/{rank}") for rank in there} | hosts
            raise ValueError(
                f"{_named(missing, known)} did not come within {self.seconds:.0f} s{self.limit};"
                f" those that did: {_named(there or [0], known)}; look at the output on the hosts"
                " that are missing"
            ) from None
        return {rank: self._read(f"{kind}/{rank}") for rank in ranks}

    def wait_for_readers(self) -> None:
        """Wait up to 10 s until all present ranks have read a refusal."""
        there = set(range(1, self.world_size)) - self.absent
        with contextlib.suppress(RuntimeError):
            self.store.wait([_key(f"read/{rank}") for rank in there], timedelta(seconds=10))


def _key(name: str) -> str:
    # The launcher's store may still hold the keys from before a restart.
    return f"handshake/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
