"""The state that the threads of one launcher share, and the names that ranks and launcher share."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from megatron_mlra.command_line.output import say_error as say

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""SIGUSR1, since srun passes it to a step, while at SIGTERM srun kills the step. SIGINT comes from
a terminal's Ctrl-C, SIGHUP from a closed terminal; neither reaches the ranks, to which torchrun
gives sessions of their own."""

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a launcher, or a rank, that a second Ctrl-C ended at once."""

ONE_PRESS = 0.2
"""Seconds behind a Ctrl-C within which another is the same one: `timeout -s INT` sends SIGINT to
its child and at once to their process group, and nobody has read `ONCE` so soon."""

ONCE = (
    "note: stopping in order; the step under way is ended, and saved where there is --save, and"
    " no other begins (a second Ctrl-C ends the run at once)"
)
"""Message of the first Ctrl-C, since the rest of a step, or of the start-up, may take a while."""
AGAIN = (
    "error: ended at once by a second Ctrl-C; a save in progress is lost, earlier checkpoints are"
    " whole"
)

INTERVAL = 1.0
"""Seconds between two calls of a host."""
LINGER = 3 * INTERVAL + 1
"""Seconds for which an ending launcher waits, so that all hosts read the reason."""


class Phase(Enum):
    """The activity of the agent's thread."""

    MEETING = "waiting for the other hosts"
    RUNNING = "watching its ranks"
    PARTING = "waiting for the other hosts to finish"


class Ended(Exception):
    """This launcher ends for a reason outside its own ranks."""


class Control:
    """State of one launcher. The agent's thread polls the state; other threads change it."""

    def __init__(self) -> None:
        self.asked = ""
        """Name of the signal that asked the run to stop; empty if none did."""
        self.over: int | None = None
        """Exit code, set when this launcher must end without waiting for its ranks."""
        self.finished = False
        """Whether the agent has returned, so that other hosts no longer matter."""
        self.ran = False
        """Whether ranks have been started."""
        self.phase = Phase.MEETING
        self._interrupted: float | None = None
        """Time of the first Ctrl-C."""
        self._lock = threading.Lock()

    def ask(self, who: str) -> None:
        """Ask the run to stop: its ranks save and end."""
        with self._lock:
            if self.asked or self.finished:
                return
            self.asked = who

    def interrupt(self) -> None:
        """Handle a Ctrl-C: the first asks the run to stop, a later one ends it."""
        with self._lock:
            first, now = self._interrupted, time.monotonic()
            if first is None:
                self._interrupted = now
            elif now - first < ONE_PRESS:
                return
        if first is not None:
            self.end(INTERRUPTED, AGAIN)
        elif self.phase is Phase.RUNNING:
            say(ONCE)
        self.ask(signal.SIGINT.name)

    def end(self, code: int, line: str) -> None:
        """Print `line` and end this launcher with the exit code `code`; its ranks are killed."""
        with self._lock:
            if self.over is None and not self.finished:
                say(line)
                self.over = code

    def exit_code(self, stopped_code: int) -> int | None:
        """The exit code if the process can end at once, without its agent; else None.

        While the agent's thread waits for other hosts, it notices neither a stop nor an end.
        """
        with self._lock:
            if self.finished or self.phase is Phase.RUNNING:
                return None
            if self.over is not None:
                return self.over
            if not self.asked or self.phase is Phase.PARTING:
                return None
            say(f"stopped by {self.asked} while no rank ran; there is nothing new to save")
            return stopped_code

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Inside the block the agent's thread is in `phase`."""
        before = self.phase
        self.phase = phase
        try:
            yield
        finally:
            self.phase = before
