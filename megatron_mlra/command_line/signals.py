"""Signals that ask a program to stop: as exceptions, and deferred.

Python lets the main thread alone set handlers. A library's user may run a training or a tool in
another thread (Ray Train does): there, nothing is set, and signals are the caller's.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def can_be_set() -> bool:
    """Whether this thread can set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def handle(numbers: Iterable[int], handler: Any) -> dict[int, Any]:
    """Set a handler of signals where one can be set.

    Args:
        handler: a function, or signal.SIG_DFL or SIG_IGN.

    Returns:
        the handlers before; nothing outside the main thread, where nothing is set.
    """
    return {n: signal.signal(n, handler) for n in numbers} if can_be_set() else {}


def restore(earlier: dict[int, Any]) -> None:
    """Set the handlers that `handle` returned."""
    for number, handler in earlier.items():
        handle((number,), handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the stop signals raise ``Interrupted``, so that clean-up code runs."""
    seen: list[int] = []

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        seen.append(number)
        raise Interrupted(number)

    earlier = handle(STOP_SIGNALS, stop)
    try:
        yield
    except Exception as error:
        if not seen:
            raise
        # C++ that called Python when the signal came (torch.save) raises an error of its own.
        raise Interrupted(seen[0]) from error
    finally:
        restore(earlier)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, stop signals wait; processes started inside begin with them blocked."""
    if not can_be_set():
        yield  # Python acts on signals in the main thread alone
        return
    waiting: list[int] = []
    earlier = handle(STOP_SIGNALS, lambda number, frame: waiting.append(number))
    # The mask is for child processes. It does not protect this one, where another thread may take
    # the signal and leave it to the main thread to act.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        restore(earlier)
        for number in waiting:
            signal.raise_signal(number)
