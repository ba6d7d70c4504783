"""What the threads of one launcher share: whether a stop was asked, and whether all is over."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from megatron_mlra.command_line.output import say_error as say

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""SIGUSR1 too: srun hands it on to a step, where it answers SIGTERM by killing the step. SIGINT is
a terminal's Ctrl-C, SIGHUP a terminal that is closed; torchrun gives ranks sessions of their own,
which neither of these reaches."""

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a launcher, or a rank, that a second Ctrl-C ends at once."""

ONCE = (
    "note: stopping in order; the step under way is ended, and saved where there is --save (a"
    " second Ctrl-C ends the run at once)"
)
"""What is said at the first one: the end of a step may take a while."""
AGAIN = (
    "error: ended at once by a second Ctrl-C; what was being saved is not, the checkpoints before"
    " it are whole"
)

REFUSED = 2
"""Exit code of a rank whose command line or input was refused: another start would end alike."""

SPEAKER = "MLRA_LAUNCHER_SPEAKS"
"""Environment of the ranks: they leave why they were refused where the launcher reads it, and it
says so once. A rank itself may be ended before its turn, because of another that was refused."""

INTERVAL = 1.0
"""Seconds between two words of hosts to each other."""
LINGER = 3 * INTERVAL + 1
"""Seconds for which a launcher that ends waits, so that all hosts read why."""


class Phase(Enum):
    """What the agent's thread does."""

    MEETING = "waiting for the other hosts"
    RUNNING = "watching its ranks"
    PARTING = "waiting for the other hosts to finish"


class Ended(Exception):
    """This launcher ends for a reason that lies outside its own ranks."""


class Control:
    """State of one launcher. The agent's thread polls it; other threads change it."""

    def __init__(self) -> None:
        self.asked = ""
        """What asked the run to stop, in words; empty while nothing did."""
        self.over: int | None = None
        """Exit code, once this launcher is to end without waiting for its ranks."""
        self.finished = False
        """Whether the agent has returned: what other hosts do no longer matters."""
        self.ran = False
        """Whether ranks have been started."""
        self.phase = Phase.MEETING
        self._interrupted = False
        self._lock = threading.Lock()

    def ask(self, who: str) -> None:
        """Ask the run to stop in order: its ranks save and end."""
        with self._lock:
            if self.asked or self.finished:
                return
            self.asked = who

    def interrupt(self) -> None:
        """A Ctrl-C: the first asks the run to stop, the second ends it."""
        with self._lock:
            again, self._interrupted = self._interrupted, True
        if again:
            self.end(INTERRUPTED, AGAIN)
        elif self.phase is Phase.RUNNING:
            say(ONCE)
        self.ask(signal.SIGINT.name)

    def end(self, code: int, line: str) -> None:
        """End this launcher; its ranks are killed."""
        with self._lock:
            if self.over is None and not self.finished:
                say(line)
                self.over = code

    def exit_code(self, stopped_code: int) -> int | None:
        """Exit code where the process can end at once, without its agent: None where it cannot.

        The agent's thread sees neither a stop nor an end while it waits for other hosts.
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
        """The agent's thread is in `phase` inside."""
        before = self.phase
        self.phase = phase
        try:
            yield
        finally:
            self.phase = before
