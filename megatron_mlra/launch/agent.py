"""torchrun's agent, which also passes stop signals to its ranks and does not restart refusals."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousClosedError

from megatron_mlra.command_line.ranks import REFUSED
from megatron_mlra.launch.control import INTERRUPTED, Control, Ended, Phase, say

_NO_FILE = "<N/A>"
"""torch's name of the file of a rank that gave no reason; torch makes up a message then."""
GRACE = 3.0
"""Seconds for the other ranks to print their errors after one failed; then they are killed."""


class Agent(LocalElasticAgent):
    """One host's agent."""

    def __init__(self, *args, control: Control, **named) -> None:
        super().__init__(*args, **named)
        self.control = control
        self.told: set[int] = set()

    def run(self, *args, **named) -> RunResult:
        """Run the agent.

        Raises:
            RendezvousError: among others, if this host was one too many and the others have ended.
        """
        result = super().run(*args, **named)
        if result is None:  # which torch's own caller does not expect
            raise RendezvousClosedError
        return result

    def _invoke_run(self, *args, **named) -> RunResult:
        self.control.phase = Phase.RUNNING
        try:
            return super()._invoke_run(*args, **named)
        finally:
            self.control.phase = Phase.PARTING

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        with self.control.during(Phase.MEETING):
            super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict:
        started = super()._start_workers(worker_group)
        self.control.ran = True
        context = self._pcontext
        close = context.close

        def close_soon(death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
            if death_sig in (None, signal.SIGTERM):
                # SIGTERM would ask the ranks to save, which they cannot without the failed rank.
                grace = 0 if self.control.over == INTERRUPTED else GRACE
                deadline = time.monotonic() + grace
                while _alive(context.pids().values()) and time.monotonic() < deadline:
                    time.sleep(0.1)
                death_sig = signal.SIGKILL
            close(death_sig, timeout)

        context.close = close_soon
        return started

    def _exit_barrier(self) -> None:
        with self.control.during(Phase.PARTING):
            super()._exit_barrier()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self.control.over is not None:
            raise Ended
        result = super()._monitor_workers(worker_group)
        if self.control.asked:
            # A restarted rank would not know of the stop.
            self._remaining_restarts = 0
            for pid in set(self._pcontext.pids().values()) - self.told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                self.told.add(pid)
        if result.is_failed():
            failures = result.failures
            if any(failure.exitcode == REFUSED for failure in failures.values()):
                self._remaining_restarts = 0
            if self._remaining_restarts > 0:
                most = worker_group.spec.max_restarts
                number = most - self._remaining_restarts + 1
                say(f"{describe(failures)}; restart {number} of {most}")
        return result


def _alive(pids) -> bool:
    """Whether one of these child processes still runs."""
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] != "Z":
                return True
    return False


def describe(failures: dict[int, ProcessFailure]) -> str:
    """How the ranks ended, in one clause: the first that failed, and the number of others."""
    rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
    if first.exitcode < 0:
        what = f"rank {rank} was killed by {signal.Signals(-first.exitcode).name}"
    else:
        what = f"rank {rank} ended with exit code {first.exitcode}"
    if len(failures) > 1:
        what += f" ({len(failures) - 1} more ended too)"
    return what


def reason(failures: dict[int, ProcessFailure]) -> str:
    """The reason that the earliest failed rank with a reason gave; empty if none gave one."""
    for failure in sorted(failures.values(), key=lambda failure: failure.timestamp):
        if failure.exitcode > 0 and failure.error_file != _NO_FILE:
            return failure.message
    return ""
