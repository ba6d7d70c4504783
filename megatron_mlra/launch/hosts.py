"""The hosts of one run tell each other who is there, who was asked to stop, and who has failed.

Each launcher writes a call into the store in which torchrun's agents meet. The launchers on the
store's own host read all calls and write news, which all others read: two keys per round, for any
number of hosts.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta

from torch.distributed import TCPStore

from megatron_mlra.launch.call import (
    COUNT,
    LONGEST,
    MOST,
    Call,
    is_code,
    key,
    read_call,
    read_fields,
)
from megatron_mlra.launch.control import INTERVAL, LINGER, Control, say

SILENT = 15.0
"""Seconds without a call after which a host counts as gone, and the others are told."""
DEAD = 60.0
"""Seconds without contact to the first host, which has the store, after which the others end."""
LATE = 60.0
"""Seconds after which a message names the hosts that have come, if some are missing."""

DOUBLE = 5.0
"""Seconds with more launchers than hosts after which a second one of a host must end."""

GAP = 1000
"""Consecutive numbers without a call after which the search for calls ends. A host takes its number
just before it calls, so that honest gaps are short."""

_NEWS, _BEAT = "mlra/news", "mlra/beat"


@dataclass
class News:
    """The message to all hosts."""

    asked: str = ""
    """The signal that asked the run to stop, with its host; or empty."""
    code: int | None = None
    """The exit code with which all hosts must end, if any; the last line is the reason."""
    lines: list[str] = field(default_factory=list)
    """All lines to print so far."""
    spare: list[int] = field(default_factory=list)
    """Numbers of the calls whose launchers must end, since their host has another one."""


def read_news(text: str | bytes) -> News:
    """The news of the first host.

    Raises:
        ValueError: the text is no news. Any program that reaches the port could have written it.
    """
    said = read_fields(text, {"asked", "code"})
    news = News(said["asked"], said["code"], said.get("lines"), said.get("spare", []))
    if not (
        isinstance(news.asked, str)
        and is_code(news.code)
        and isinstance(news.lines, list)
        and all(isinstance(line, str) for line in news.lines)
        and (news.lines or news.code is None)
        and isinstance(news.spare, list)
        and all(type(number) is int for number in news.spare)
    ):
        raise ValueError("this is no news")
    return news


def calls_in(store: TCPStore, note: Callable[[str], None]) -> dict[int, Call]:
    """Number -> call, of all calls in the store. Other values are skipped with a note."""
    count = store.add(COUNT, 0)
    if count > MOST:
        note("a number of calls in the hosts' store is none; is its port open to others?")
    calls: dict[int, Call] = {}
    number = last = 0
    while number < min(count, last + GAP):
        number += 1
        if not store.check([key(number)]):
            continue
        last = number
        try:
            calls[number] = read_call(store.get(key(number)))
        except ValueError:
            note("a call in the hosts' store is none, and left out; is its port open to others?")
    return calls


class Judge:
    """Turns calls into news. Has no threads and sockets."""

    def __init__(self, join_timeout: float, now: float) -> None:
        self.join_timeout, self.began = join_timeout, now
        self.news = News()
        self.came: dict[int, float] = {}
        """Number of a call -> when it was first read."""
        self.heard: dict[int, tuple[int, float]] = {}
        self.gone: set[int] = set()
        self.asked_for = False
        self.doubled: float | None = None
        """Since when there are more launchers than hosts."""

    def read(self, calls: dict[int, Call], now: float) -> News:
        """Read one round of calls; returns the news.

        Args:
            calls: number -> call.
            now: seconds of a monotonic clock.
        """
        for number, call in calls.items():
            self.came.setdefault(number, now)
            if call.beat != self.heard.get(number, (-1, 0.0))[0]:
                self.heard[number] = (call.beat, now)
                self.gone.discard(number)
            elif call.code is None and number not in self.gone:
                silence = now - self.heard[number][1]
                if any(n > number and other.host == call.host for n, other in calls.items()):
                    self.gone.add(number)  # a new launcher on that host has replaced this one
                elif silence > SILENT:
                    self.gone.add(number)
                    self._say(
                        f"host {call.host} gives no sign of life for {silence:.0f} s; if it does"
                        f" not come back, the others wait {self.join_timeout:.0f} s (JOIN_TIMEOUT)"
                    )
            if call.asked and not self.news.asked:
                self.news.asked = f"{call.asked} (host {call.host})"
            if call.code and number not in self.news.spare:
                self._end(call.code, f"host {call.host} ended: {call.why}")
        left_out = {*self.gone, *self.news.spare}
        there = {n: c for n, c in calls.items() if n not in left_out and c.code is None}
        # A host that has just died is silent since before the one in its place came.
        newest = max((self.came[n] for n in there), default=now)
        sure = {n: call for n, call in there.items() if self.heard[n][1] >= newest}
        self._compare([*sure.values()])
        self._find_doubles(sure, now)
        self._ask_for_missing([*there.values()], now)
        return self.news

    def _compare(self, live: list[Call]) -> None:
        for name, value in (("NODES", "nodes"), ("RDZV_ID", "run")):
            first = live[0] if live else None
            for call in live[1:]:
                here, there = getattr(first, value), getattr(call, value)
                if here != there:
                    self._end(
                        2,
                        f"{name} is {here} on host {first.host} and {there} on host {call.host};"
                        " give all hosts the same",
                    )
        hosts = sorted({call.host for call in live})
        if live and len(hosts) > int(live[0].nodes):
            self._end(2, f"NODES is {live[0].nodes}, but more have come: {', '.join(hosts)}")
        # With more launchers than hosts, one host's later launcher ends.
        if live and len(live) <= int(live[0].nodes) and any(call.node_rank for call in live):
            self._compare_ranks(live)

    def _compare_ranks(self, live: list[Call]) -> None:
        """Hosts of one NODE_RANK would be in the order of their names, which nobody chose. 0 on all
        hosts asks for that order."""
        of: dict[int, set[str]] = {}
        for call in live:
            of.setdefault(call.node_rank, set()).add(call.host)
        for rank, hosts in of.items():
            if len(hosts) > 1:
                named = ", ".join(sorted(hosts)[:8])
                self._end(
                    2,
                    f"NODE_RANK (--node-rank) is {rank} on the hosts {named}; give each host its"
                    " own, or all 0",
                )

    def _find_doubles(self, live: dict[int, Call], now: float) -> None:
        """Of a host that was started twice, the later launcher is told to end: the hosts would meet
        without one of them, and two launchers would share one host's GPUs."""
        excess = len(live) - int(next(iter(live.values())).nodes) if live else 0
        if excess <= 0:
            self.doubled = None
            return
        if self.doubled is None:
            self.doubled = now
        if now - self.doubled < DOUBLE:
            return
        for number in sorted(live, reverse=True)[:excess]:
            if any(n < number and call.host == live[number].host for n, call in live.items()):
                self.news.spare.append(number)

    def _ask_for_missing(self, live: list[Call], now: float) -> None:
        wanted = int(live[0].nodes) if live else 0
        if len(live) < wanted and now - self.began > LATE and not self.asked_for and not self.gone:
            self.asked_for = True
            hosts = ", ".join(sorted(call.host for call in live[:8]))
            self._say(
                f"{wanted - len(live)} of {wanted} hosts are missing after {LATE:.0f} s; here:"
                f" {hosts}. On the others compare NODES, RDZV_ENDPOINT and RDZV_ID; waiting"
                f" {self.join_timeout:.0f} s in all (JOIN_TIMEOUT)"
            )

    def _say(self, line: str) -> None:
        self.news.lines.append(line)

    def _end(self, code: int, line: str) -> None:
        if self.news.code is None:
            self.news.code = code
            self._say(line)


class Hosts:
    """One launcher's thread that sends calls and follows the news."""

    def __init__(
        self, control: Control, call: Call, endpoint: tuple[str, int], join_timeout: float
    ) -> None:
        self.control, self.call, self.endpoint = control, call, endpoint
        self.judges = False
        """Whether the store is on this host."""
        self.join_timeout = join_timeout
        self.reached: float | None = None
        self._number: int | None = None
        self._judge: Judge | None = None
        self._told = 0
        self._noted: set[str] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, judges: bool) -> None:
        """Start the thread.

        Args:
            judges: whether the store is on this host.
        """
        self.judges = judges
        if judges:
            self._judge = Judge(self.join_timeout, time.monotonic())
        self._thread.start()

    def report(self, code: int, why: str) -> None:
        """Tell all hosts the exit code and its reason; returns after they had time to read it."""
        self.call.code, self.call.why = code, why
        self._thread.join(LINGER)

    def check(self) -> None:
        """End the launcher if the store's host is gone. Called by another thread than `_run`, whose
        request to a dead host may hang."""
        if self.reached is None or self.judges or self.call.code is not None:
            return
        silence = time.monotonic() - self.reached
        if silence > DEAD:
            host, port = self.endpoint
            self.control.end(
                1,
                f"error: host {host}, where all meet ({host}:{port}), gives no sign of life for"
                f" {silence:.0f} s",
            )

    def _run(self) -> None:
        while True:
            try:
                self._rounds()
            except RuntimeError as error:
                if self.reached is None:
                    say(
                        f"note: hosts cannot hear of each other: {str(error).partition(chr(10))[0]}"
                    )
                    return
                # A request failed, or the store has ended with its host's launcher. `check` counts
                # the time.
                time.sleep(INTERVAL)
            except Exception as error:
                # If this thread ended, the other hosts would consider this healthy host gone.
                self._note(f"a word between hosts went wrong ({type(error).__name__}: {error})")
                time.sleep(INTERVAL)

    def _note(self, line: str) -> None:
        """Print a line once."""
        if line not in self._noted and len(self._noted) < 9:
            self._noted.add(line)
            say(f"note: {line[:LONGEST]}")

    def _rounds(self) -> None:
        store = self._connect()
        if self._number is None or self._number > store.add(COUNT, 0):
            self._number = store.add(COUNT, 1)
        number, judge = self._number, self._judge
        beat = b""
        while True:
            begin = time.monotonic()
            self.call.beat += 1
            self.call.asked = self.control.asked
            store.set(key(number), json.dumps(asdict(self.call)))
            if judge:
                news = judge.read(calls_in(store, self._note), begin)
                store.multi_set([_NEWS, _BEAT], [json.dumps(asdict(news)), str(self.call.beat)])
                self.reached = begin
                self._heed(news)
            elif store.check([_NEWS, _BEAT]):
                text, now_beat = store.multi_get([_NEWS, _BEAT])
                if now_beat != beat:
                    beat, self.reached = now_beat, time.monotonic()
                try:
                    self._heed(read_news(text))
                except ValueError:
                    self._note("news in the hosts' store is none; is its port open to others?")
            time.sleep(INTERVAL)
            if self.reached is not None and time.monotonic() - begin > INTERVAL + SILENT / 3:
                # This process itself was stopped, perhaps with the whole job.
                self.reached = time.monotonic()

    def _connect(self) -> TCPStore:
        """A client of the store of torchrun's agents, which wait for it for `join_timeout` too.

        Raises:
            RuntimeError: the store did not answer in time.
        """
        deadline = time.monotonic() + self.join_timeout
        while True:
            try:
                host, port = self.endpoint
                timeout = timedelta(seconds=SILENT)
                return TCPStore(host, port, None, False, timeout, wait_for_workers=False)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(INTERVAL)

    def _heed(self, news: News) -> None:
        own = self.call.code is not None
        for line in news.lines[self._told :]:
            last = news.code is not None and line == news.lines[-1]
            # A host that ends has printed its own reason already.
            if not own and not last:
                say(f"note: {line}")
        self._told = len(news.lines)
        if self._number in news.spare and not own:
            self.control.end(
                2,
                f"error: host {self.call.host} was started twice: there are more launchers than"
                f" NODES, which is {self.call.nodes}; this later one ends, start one on each host",
            )
        if news.asked:
            self.control.ask(news.asked)
        if news.code is not None and not own:
            self.control.end(news.code, f"error: {news.lines[-1]}")
