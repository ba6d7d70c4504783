"""Signals that ask a program to stop: as exceptions, and deferred."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the stop signals raise ``Interrupted``, so that clean-up code runs."""
    seen: list[int] = []

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        seen.append(number)
        raise Interrupted(number)

    earlier = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    except Exception as error:
        if not seen:
            raise
        # C++ that called Python when the signal came (torch.save) raises an error of its own.
        raise Interrupted(seen[0]) from error
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, stop signals wait; processes started inside begin with them blocked."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python acts on signals in the main thread alone
        return
    waiting: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: waiting.append(number))
        for number in STOP_SIGNALS
    }
    # The mask is for child processes. It does not protect this one, where another thread may take
    # the signal and leave it to the main thread to act.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)
