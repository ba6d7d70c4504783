"""Stop signals, handled from the first line of the entry to the last step.

SIGTERM, Ctrl-C (SIGINT) and a closed terminal (SIGHUP) ask a run to stop: the current step is
completed and saved. A second Ctrl-C ends the run at once.

This module is imported before torch and uses only the standard library. Outside the main thread no
signal is handled: signals are left to the code that started the thread.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from megatron_mlra.command_line.output import say_error
from megatron_mlra.command_line.ranks import first_of_host
from megatron_mlra.command_line.signals import can_be_set, get_when_parent_ends, handle
from megatron_mlra.launch.control import ONCE, ONE_PRESS

STARTING = (
    "note: stopping in order; the run is still starting, and ends before its first step (a second"
    " Ctrl-C ends it at once)"
)
"""Message of a first Ctrl-C before `hand_over`: imports and checks may take a minute."""

_numbers: set[signal.Signals] = set()
_asked: signal.Signals | None = None
_handler: Any = None
_told: list[int] = []
_over = False
"""Whether the run has ended, so that a later signal has nothing to stop."""
_by_default = False
"""Whether signals have their default action."""


def listen(*numbers: signal.Signals) -> None:
    """Handle these signals from here on, and those that are pending.

    The launcher starts ranks with SIGTERM blocked, so that a signal during the start of Python is
    pending here, and does not kill the rank. Outside the main thread this does nothing.
    """
    if not can_be_set():
        return
    # `nohup` starts a program with SIGHUP ignored, which is respected.
    ignored = {n for n in numbers if n == signal.SIGHUP and signal.getsignal(n) is signal.SIG_IGN}
    _numbers.update({*numbers} - ignored)
    handle(_numbers, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _numbers)


def listen_to_interrupts(end: Callable[[], None]) -> None:
    """Let a first SIGINT ask the run to stop, and a second one call `end`.

    One that comes within `ONE_PRESS` of the first is the first, sent twice.

    A thread waits for SIGINT, which is blocked in all later threads and in this one: the main
    thread would act on it only after its current import, collective or file write. Child processes
    inherit the block, so that a terminal's Ctrl-C does not end the helper processes of the last
    save. Threads that are there already, as those of numpy, may still be given SIGINT. Python's
    handler then hands it on, in whichever thread it runs.

    Nothing is done if SIGINT is ignored, as in background jobs of a script.

    Args:
        end: ends the process; called in a waiting thread.
    """
    if not can_be_set() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    asked: float | None = None
    one_by_one = threading.Lock()

    def hear() -> None:
        nonlocal asked
        with one_by_one:
            if _by_default:
                _thread.interrupt_main()
            elif _over:
                return
            elif asked is None:
                _note(signal.SIGINT, None)
                if first_of_host():
                    say_error(STARTING if _handler is None else ONCE)
                asked = time.monotonic()
            elif time.monotonic() - asked >= ONE_PRESS:
                end()

    def wait() -> None:
        while True:
            signal.sigwait({signal.SIGINT})
            hear()

    def wait_for_others() -> None:
        while numbers := os.read(heard, 64):
            for _ in range(0 if _by_default else numbers.count(signal.SIGINT)):
                hear()

    heard, told = os.pipe()
    os.set_blocking(told, False)
    handle((signal.SIGINT,), _leave_to_threads)
    # The handler of the C library writes the number of each signal there at once; the one in Python
    # waits for the main thread.
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    for work in (wait, wait_for_others):
        threading.Thread(target=work, name="Ctrl-C", daemon=True).start()


def _leave_to_threads(number: int, frame: FrameType | None) -> None:
    """The handler of SIGINT in the main thread, beside the threads that wait for it."""
    if _by_default:
        signal.default_int_handler(number, frame)


def listen_to_launcher() -> None:
    """Let the end of this rank's launcher (`mlra launch`, torchrun) ask the run to stop.

    A launcher may be killed, for want of memory for example. Nobody would then stop the ranks or
    start them again, and the next run would find their GPUs and their folder taken.
    """
    if can_be_set() and "TORCHELASTIC_RUN_ID" in os.environ:
        get_when_parent_ends(signal.SIGTERM)


def heeded() -> frozenset[signal.Signals]:
    """The signals that ask this run to stop; its helper processes must have them blocked."""
    return frozenset(_numbers) | {signal.SIGINT}


def close() -> None:
    """Ignore the signals from here on, since the run has ended.

    Python restores the default actions of signals before it exits. A late stop signal, relayed by
    another host for example, would then kill a rank that has ended normally.
    """
    global _over
    _over = True
    handle(_numbers, signal.SIG_IGN)


def ignore_no_more() -> None:
    """Restore the signals' default action, to end the process (`--no-exit-signal-handler`)."""
    global _by_default
    _by_default = True
    handle(_numbers, signal.SIG_DFL)
    if _asked is not None:
        signal.raise_signal(_asked)


def hand_over(handler: Any) -> None:
    """Report earlier signals to Megatron's handler, and all later ones of `heeded`.

    Args:
        handler: Megatron's DistributedSignalHandler, which asks all ranks at the end of each step.
    """
    global _handler
    _handler = handler
    handler._signal_received = _asked is not None
    listen()


def enter_where_possible(enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Megatron's `DistributedSignalHandler.__enter__`, which would fail outside the main thread."""

    def enter_or_leave(handler: Any) -> Any:
        if can_be_set():
            return enter(handler)
        handler._signal_received, handler.released = False, True
        return handler

    return enter_or_leave


def remember_told(ask_all: Callable[[Any], list[int]]) -> Callable[[Any], list[int]]:
    """Megatron's `signals_received`, whose result is kept for `by`."""

    def signals_received(handler: Any) -> list[int]:
        received = ask_all(handler)
        _told[:] = [rank for rank, was_told in enumerate(received) if was_told]
        return received

    return signals_received


def any_rank_asked() -> bool:
    """Whether any rank was asked to stop, the same on all ranks. A collective: all must call it."""
    return _handler is not None and any(_handler.signals_received())


def by() -> str:
    """The signal that stops the run, as the end of a clause (` by SIGTERM`); empty if none does."""
    if _asked is not None:
        return f" by {_asked.name}"
    if not _told:
        return ""
    return f" by a signal to rank {', '.join(map(str, _told[:4]))}"


def _note(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = signal.Signals(number)
    if _handler is not None:
        _handler._signal_received = True
