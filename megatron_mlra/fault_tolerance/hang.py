"""Decides which rank hangs, from the last heartbeat (beat) of every rank.

There are two kinds of hangs: a process that sends no beats any more (stopped, or its node is dead),
and a live process for which the others wait inside a collective. The place of the main thread tells
the second kind from its victims: a victim is inside communication, the culprit is not.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

_MOST_NAMED = 4


@dataclass(frozen=True)
class Beat:
    """A rank's report on itself."""

    rank: int
    host: str
    pid: int
    device: str
    """The rank's device, in words: `GPU 3`."""
    number: int
    """Number of the beat, so that no two beats are equal."""
    step: int
    marks: int
    """Number of marks that the training loop has passed."""
    phase: str
    bounded: bool
    """Whether the phase takes less than the limit in a healthy run."""
    waiting: bool
    """Whether the main thread is in communication with other ranks."""
    at: str
    """The line of code of the main thread: `file.py:12 (function)`."""
    idle: float
    """Seconds since the rank last passed a mark or started a collective."""

    def write(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Beat:
        """From `write`."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Heard:
    """A rank's last beat, and the seconds since it arrived (`silent`)."""

    beat: Beat
    silent: float


@dataclass(frozen=True)
class Verdict:
    """The reason to end the job: the ranks that hang, or the error of one rank."""

    ranks: tuple[int, ...]
    line: str
    """The message, which names the ranks."""
    told_on: str | None = None
    """Host of the rank whose error ends the job; None for a hang."""

    def write(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Verdict:
        """From `write`."""
        fields = json.loads(text)
        return cls(tuple(fields["ranks"]), fields["line"], fields["told_on"])


def judge(heard: Sequence[Heard], limit: float) -> Verdict | None:
    """The verdict on a job that hangs; None if it does not.

    The job hangs if for `limit` seconds a rank has sent no beat, or has made no progress in a
    bounded phase or in communication. A phase that may take any time (starting, saving) therefore
    ends the job only if other ranks wait for it.

    Args:
        heard: every rank's last beat, indexed by rank.
        limit: seconds.
    """
    if not any(
        it.silent > limit or (_idle(it) > limit and (it.beat.bounded or it.beat.waiting))
        for it in heard
    ):
        return None
    # A silent rank stalls all others at once, and they may reach the limit before it does.
    silent = [rank for rank, it in enumerate(heard) if it.silent > limit / 2]
    if silent:
        return Verdict(tuple(silent), _line(silent, heard, _silent))
    busy = [rank for rank, it in enumerate(heard) if not it.beat.waiting]
    busy = [rank for rank in busy if _idle(heard[rank]) > limit / 2] or busy
    if busy:
        return Verdict(tuple(busy), _line(busy, heard, _busy))
    behind = min((it.beat.step, it.beat.marks) for it in heard)
    last = [r for r, it in enumerate(heard) if (it.beat.step, it.beat.marks) == behind]
    line = "every rank waits in communication; furthest behind: " + _line(last, heard, _busy)
    return Verdict(tuple(last), line)


def silent_host(beat: Beat, seconds: float) -> Verdict:
    """The verdict of a rank that no longer reaches rank 0, which keeps the beats.

    Args:
        beat: the last beat of rank 0.
        seconds: since rank 0 was last reached.
    """
    return Verdict((0,), _line([0], [Heard(beat, seconds)], _silent))


def _idle(heard: Heard) -> float:
    return heard.beat.idle + heard.silent


def _line(ranks: list[int], heard: Sequence[Heard], says: Callable[[Heard], str]) -> str:
    named = [f"rank {r} {_place(heard[r].beat)} {says(heard[r])}" for r in ranks[:_MOST_NAMED]]
    if more := ranks[_MOST_NAMED:]:
        hosts = sorted({heard[r].beat.host for r in more})
        named.append(f"and {len(more)} more ranks on {', '.join(hosts[:8])}")
    return "; ".join(named)


def _place(beat: Beat) -> str:
    return f"(host {beat.host}, pid {beat.pid}, {beat.device})"


def _silent(heard: Heard) -> str:
    last = f"last at step {heard.beat.step:,}, {heard.beat.phase}"
    return f"hangs: no sign of life for {heard.silent:.0f} s; {last}"


def _busy(heard: Heard) -> str:
    beat = heard.beat
    return (
        f"hangs: alive, but no progress for {_idle(heard):.0f} s; at step {beat.step:,},"
        f" {beat.phase}, {beat.at}"
    )


def collective_seconds(args: Namespace) -> float:
    """Seconds that a collective may wait during training before torch ends the process."""
    return args.distributed_timeout_seconds_after_init or 60 * args.distributed_timeout_minutes
