"""Stop signals, raised as exceptions or deferred.

Only Python's main thread can set signal handlers. A caller may run a training or a tool in another
thread (Ray Train does). There no handler is set, and signals are left to the caller.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1
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
    """Set a handler for these signals, in the main thread only.

    Args:
        handler: a function, or signal.SIG_DFL or SIG_IGN.

    Returns:
        Signal -> previous handler, for `restore`; empty in other threads.
    """
    return {n: signal.signal(n, handler) for n in numbers} if can_be_set() else {}


def restore(earlier: dict[int, Any]) -> None:
    """Set the handlers that `handle` returned."""
    for number, handler in earlier.items():
        handle((number,), handler)


def get_when_parent_ends(number: signal.Signals) -> None:
    """Let the kernel send this process a signal when the thread that started the process ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block, the stop signals raise ``Interrupted``, so that clean-up code runs."""
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
        # C++ code that called Python when the signal came (torch.save) raises another error.
        raise Interrupted(seen[0]) from error
    finally:
        restore(earlier)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Delay stop signals until the end of the block. Processes started inside the block begin with
    those signals blocked."""
    if not can_be_set():
        yield  # Python runs handlers in the main thread only, so nothing interrupts this one
        return
    waiting: list[int] = []
    earlier = handle(STOP_SIGNALS, lambda number, frame: waiting.append(number))
    # The mask is inherited by child processes. It does not protect this process: another thread may
    # receive the signal, and Python then runs the handler in the main thread.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        restore(earlier)
        for number in waiting:
            signal.raise_signal(number)
