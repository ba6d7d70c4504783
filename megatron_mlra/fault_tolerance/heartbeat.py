"""Heartbeats: every rank reports its progress; a hang ends the job with a line that names the rank.

Rank 0 keeps the beats of all ranks in its own store, and judges them (hang.py). Every other rank
writes its beat and reads two keys: the verdict, and rank 0's beat. A rank that no longer reaches
rank 0 names rank 0. Threads do all of this. They release the GIL while they wait, so that they run
while the main thread is stuck in a collective. A main thread that never releases the GIL silences
its rank, which the other ranks notice.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from megatron_mlra.command_line.output import say_error
from megatron_mlra.fault_tolerance.hang import (
    Beat,
    Heard,
    Verdict,
    collective_seconds,
    judge,
    silent_host,
)
from megatron_mlra.fault_tolerance.rank_state import collectives, communication, leave_stacks

SHARE_OF_TIMEOUT = 0.8
"""Default limit, as a share of --distributed-timeout-minutes: a hang is reported before torch's
timeout, which would end the job a little later anyway."""

_CONNECT = timedelta(seconds=60)
_VERDICT = "verdict"
_OFF = "off"


class _Progress:
    """The place of the training loop: written by the main thread, read by the watch's threads."""

    def __init__(self) -> None:
        # One tuple, replaced as a whole: step, phase, bounded, marks.
        self.now = (0, "starting", False, 0)
        self.past_first_step = False

    def mark(self, phase: str, *, step: int | None = None, bounded: bool = True) -> None:
        before, _, _, marks = self.now
        # A first step may take any time: it compiles and allocates.
        bounded = bounded and self.past_first_step
        self.now = (before if step is None else step, phase, bounded, marks + 1)


_progress = _Progress()
_watch: Watch | None = None


def mark(phase: str) -> None:
    """Note that the training loop enters `phase` of its current step."""
    _progress.mark(phase)


@contextmanager
def saving() -> Iterator[None]:
    """Inside the block the rank saves, which may take any time, unless other ranks wait."""
    _, before, bounded, _ = _progress.now
    _progress.mark("saving", bounded=False)
    yield
    _progress.mark(before, bounded=bounded)


def tell(line: str) -> None:
    """End all ranks with the error of this rank. Without this the other ranks, which wait for this
    rank in a collective, could only report that it is gone. Each host prints the line once.

    Returns only if there is no watch: the caller then raises the error.
    """
    if _watch is not None and _watch.threads:
        _watch.tell(line)


def limit_of(args: Namespace) -> float:
    """Seconds after which a hang ends the job; 0 for never."""
    if args.world_size == 1:
        return 0.0
    if args.hang_timeout_seconds is None:
        return SHARE_OF_TIMEOUT * collective_seconds(args)
    return args.hang_timeout_seconds


def watch(
    args: Namespace, folder: Path, before_leaving: Callable[[], object] = lambda: None
) -> Watch | None:
    """The watch over all ranks, not yet started; None if a hang never ends the job.

    Args:
        args: of the run.
        folder: where a hanging rank writes the stacks of its threads, if it can.
        before_leaving: called before the watch ends this process, in the watch's thread.
    """
    global _watch
    limit = limit_of(args)
    _watch = Watch(args.rank, args.world_size, limit, folder, before_leaving) if limit else None
    return _watch


def mark_step(train_step: Callable, args: Namespace) -> Callable:
    """Megatron's `train_step`, with a mark at its begin and its end."""

    @functools.wraps(train_step)
    def marked_step(*rest, **named):
        _progress.mark("before its batch", step=args.curr_iteration + 1)
        result = train_step(*rest, **named)
        _progress.past_first_step = True
        _progress.mark("after its update")
        return result

    return marked_step


def mark_end(train: Callable) -> Callable:
    """Megatron's `train`, with a mark at its end, after which a phase may take any time."""

    @functools.wraps(train)
    def train_and_mark(*rest, **named):
        try:
            return train(*rest, **named)
        finally:
            _progress.mark("ending", bounded=False)

    return train_and_mark


class Watch:
    """The heartbeat threads of one rank; see `watch` for the arguments."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        limit: float,
        folder: Path,
        before_leaving: Callable[[], object] = lambda: None,
    ) -> None:
        self.before_leaving = before_leaving
        self.rank, self.world_size, self.limit, self.folder = rank, world_size, limit, folder
        self.interval = min(15.0, limit / 20)
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = f"GPU {local}" if torch.cuda.is_available() else f"local rank {local}"
        self.speaks = local == 0  # one rank per host prints verdicts
        self.main = threading.main_thread().ident
        self.ended = threading.Event()
        self.threads: list[threading.Thread] = []
        self.beats = 0
        self.last: tuple[int, int] | None = None
        self.since = 0.0
        self.probe: threading.Thread | None = None
        self.host_beat: Beat | None = None
        self.reached = 0.0

    def start_after(self, initialize: Callable) -> Callable:
        """Megatron's `initialize_megatron`, then the start: from there on ranks can communicate."""

        @functools.wraps(initialize)
        def initialize_and_watch(*rest, **named):
            result = initialize(*rest, **named)
            self.start()
            return result

        return initialize_and_watch

    def start(self) -> None:
        """Connect to the store of rank 0 and start the threads, after every rank's first beat.

        Raises:
            RuntimeError: this rank cannot reach rank 0's store.
        """
        where: list[tuple[str, int] | None] = [None]
        if self.rank == 0:
            _allow_connections(self.world_size)
            address = os.environ["MASTER_ADDR"]
            self.store = TCPStore(address, 0, None, True, _CONNECT, wait_for_workers=False)
            for key in (_VERDICT, *map(_key, range(self.world_size))):
                self.store.set(key, "")
            where = [(address, self.store.port)]
        dist.broadcast_object_list(where)
        if self.rank:
            address, port = where[0]
            try:
                self.store = TCPStore(address, port, None, False, _CONNECT, wait_for_workers=False)
            except RuntimeError as error:
                raise RuntimeError(
                    f"rank {self.rank} cannot reach rank 0's heartbeats at {address}:{port}"
                    f" ({error}); open ports between the nodes, or use --hang-timeout-seconds 0"
                ) from error
        self.store.set(_key(self.rank), self._beat(time.monotonic()).write())
        dist.barrier()
        rounds = [self._judge_all] if self.rank == 0 else [self._follow, self._guard]
        for run in rounds:
            thread = threading.Thread(target=self._until_broken, args=(run,), daemon=True)
            thread.start()
            self.threads.append(thread)

    def stop(self) -> None:
        """End the threads. No rank may exit before all ranks have called this. Rank 0's store stays
        for ranks that are still on their way here."""
        self.ended.set()
        for thread in self.threads:
            thread.join(5)

    def tell(self, line: str) -> None:
        """See the function `tell`."""
        mine = first = Verdict((self.rank,), f"(rank {self.rank}): {line}", socket.gethostname())
        with contextlib.suppress(RuntimeError):  # rank 0, which has the store, is gone
            first = Verdict.read(self.store.compare_set(_VERDICT, "", mine.write()).decode())
        self.stop()
        if first == mine:
            say_error(f"error {mine.line}")
        else:
            self._say(first)
        # A rank that sees this process end before it has read the verdict reports a lost rank.
        # Rank 0 reads the verdict within an interval, and waits two more for the others.
        time.sleep(4 * self.interval + 2)
        self._leave(first)

    def _until_broken(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception:
            # A bug in the watch ends the watch on all ranks, not the job.
            self.ended.set()
            with contextlib.suppress(RuntimeError):
                self.store.set(_VERDICT, _OFF)
            raise

    def _judge_all(self) -> None:
        """The thread of rank 0: read all beats and judge them."""
        keys = [_VERDICT, *map(_key, range(self.world_size))]
        seen = [""] * self.world_size
        changed = [time.monotonic()] * self.world_size
        while (lost := self._sleep()) is not None:
            now = time.monotonic()
            self.store.set(_key(0), self._beat(now, lost).write())
            verdict, *texts = [text.decode() for text in self.store.multi_get(keys)]
            if verdict == _OFF:
                return
            told = Verdict.read(verdict) if verdict else None
            changed = [
                now if new != old else then + lost
                for new, old, then in zip(texts, seen, changed, strict=True)
            ]
            seen = texts
            heard = [
                Heard(Beat.read(text), now - then)
                for text, then in zip(texts, changed, strict=True)
            ]
            if found := told or judge(heard, self.limit):
                self._say(found)
                self.store.set(_VERDICT, found.write())
                # The store ends with this process; the others must read the verdict first.
                time.sleep(2 * self.interval + 1)
                self._leave(found)

    def _follow(self) -> None:
        """A thread of any other rank: write a beat, read the verdict and rank 0's beat."""
        seen = ""
        while (lost := self._sleep()) is not None:
            try:
                self.store.set(_key(self.rank), self._beat(time.monotonic(), lost).write())
                verdict, host = (
                    text.decode() for text in self.store.multi_get([_VERDICT, _key(0)])
                )
            except RuntimeError:
                return  # rank 0 is gone; `_guard` goes on counting
            if verdict == _OFF:
                self.ended.set()
                return
            if verdict:
                found = Verdict.read(verdict)
                self._say(found)
                self._leave(found)
            if host != seen:
                seen, self.host_beat, self.reached = host, Beat.read(host), time.monotonic()

    def _guard(self) -> None:
        """A thread of any other rank: count the time since rank 0 was reached. `_follow` cannot,
        since its request to a dead rank 0 may hang."""
        while (lost := self._sleep()) is not None:
            self.reached += lost
            silence = time.monotonic() - self.reached
            if self.host_beat and silence > self.limit:
                # On a single host rank 0 was the only rank that prints verdicts.
                self.speaks = self.speaks or self.rank == 1
                found = silent_host(self.host_beat, silence)
                self._say(found)
                self._leave(found)

    def _sleep(self) -> float | None:
        """Wait for the next round.

        Returns:
            Seconds for which this process itself was stopped (perhaps with the whole job), which
            must not count as another rank's silence; None to end the thread.
        """
        begin = time.monotonic()
        if self.ended.wait(self.interval):
            return None
        late = time.monotonic() - begin - self.interval
        return late if late > max(1.0, self.limit / 4) else 0.0

    def _beat(self, now: float, lost: float = 0.0) -> Beat:
        step, phase, bounded, marks = _progress.now
        progress = (marks, collectives())
        if progress != self.last:
            self.last, self.since = progress, now
        else:
            self.since += lost
        idle = now - self.since
        waiting, at = communication(self.main)
        if not waiting and idle > self.limit / 2 and torch.cuda.is_initialized():
            waiting = self._gpu_is_busy()
        self.beats += 1
        who = (self.rank, socket.gethostname(), os.getpid(), self.device)
        return Beat(*who, self.beats, step, marks, phase, bounded, waiting, at, idle)

    def _gpu_is_busy(self) -> bool:
        """Whether work is queued on this rank's GPU. While a rank waits inside a collective of
        NCCL, its main thread may be anywhere, but its GPU is busy; the GPU of the culprit is idle.
        The driver may not answer, so that another thread asks."""
        if self.probe is None or not self.probe.is_alive():
            answer: list[bool] = []
            stream = torch.cuda.default_stream(int(os.environ.get("LOCAL_RANK", 0)))
            self.probe = threading.Thread(target=lambda: answer.append(stream.query()), daemon=True)
            self.probe.start()
            self.probe.join(min(2.0, self.interval))
            return answer != [True]
        return True

    def _say(self, verdict: Verdict) -> None:
        # Not through sys.stderr: the main thread may hold its lock.
        if verdict.told_on is None and self.speaks:
            say_error(f"error: {verdict.line} (--hang-timeout-seconds {self.limit:g})")
        elif verdict.told_on not in (None, socket.gethostname()) and self.speaks:
            say_error(f"error {verdict.line}")

    def _leave(self, verdict: Verdict) -> None:
        if verdict.told_on is None and self.rank in verdict.ranks:
            leave_stacks(self.folder / f"hang-rank-{self.rank}.log")
        self.before_leaving()
        os._exit(1)


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _allow_connections(world_size: int) -> None:
    """Raise the limit on open files, commonly 1,024: every rank has a connection to rank 0."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + 2 * world_size if soft < 4 * world_size + 1024 else soft
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
