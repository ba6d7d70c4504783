"""Which rank hangs, judged from what the ranks last said of themselves.

Two kinds: a process that says nothing any more (stopped, its node dead), and one that is alive
while the others wait for it inside a collective. The second is told from its victims by where its
main thread is: a victim is inside communication, the culprit is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

_MOST_NAMED = 4


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    device: str
    """The device it computes on, in words: `GPU 3`."""
    number: int
    """Counts its beats, so that no two are the same."""
    step: int
    marks: int
    """Marks that its training loop has passed."""
    phase: str
    bounded: bool
    """Whether the phase takes less than the limit in a healthy run."""
    waiting: bool
    """Whether its main thread is in communication with other ranks."""
    at: str
    """Where its main thread is: `file.py:12 (function)`."""
    idle: float
    """Seconds since it last passed a mark or started a collective."""

    def write(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Beat:
        """From `write`."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Heard:
    """What is known of a rank: its last beat, and the seconds since that came."""

    beat: Beat
    silent: float


@dataclass(frozen=True)
class Verdict:
    """What ends the job: the ranks that hang and a line that names them, or a line of one rank."""

    ranks: tuple[int, ...]
    line: str
    told_on: str | None = None
    """The host of the rank that ends the job by this line of its own; None for a hang."""

    def write(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Verdict:
        """From `write`."""
        fields = json.loads(text)
        return cls(tuple(fields["ranks"]), fields["line"], fields["told_on"])


def judge(heard: Sequence[Heard], limit: float) -> Verdict | None:
    """Whether the job hangs, and by whom.

    It does when a rank has said nothing for `limit` seconds; or has made no progress for as long in
    a phase that is bounded, or in waiting for others. Phases that may take any time (starting,
    saving) so end the job only if others wait for them.

    Args:
        heard: of every rank, by rank.
        limit: seconds.
    """
    if not any(
        it.silent > limit or (_idle(it) > limit and (it.beat.bounded or it.beat.waiting))
        for it in heard
    ):
        return None
    # A rank that fell silent stalls all others at once, who may reach the limit first.
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
    """The verdict of a rank that no longer reaches rank 0, where the beats are kept.

    Args:
        beat: the last of rank 0.
        seconds: since it was reached.
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
