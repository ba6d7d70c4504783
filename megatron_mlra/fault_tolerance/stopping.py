"""Signals that ask a run to stop, heeded from the entry's first line to its last step.

Ctrl-C (SIGINT) and a terminal that is closed (SIGHUP) ask as SIGTERM does: the step is ended and
saved. A second Ctrl-C ends the run at once.

This module is imported before torch, so it needs the standard library alone. In another thread
than the main one no signal is heeded: whoever started the thread decides what they do.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from megatron_mlra.command_line.output import say_error
from megatron_mlra.command_line.signals import can_be_set, handle
from megatron_mlra.launch.control import ONCE

_numbers: set[signal.Signals] = set()
_asked: signal.Signals | None = None
_handler: Any = None
_told: list[int] = []
_over = False
"""Whether the run has ended: a stop that comes later has nothing to stop."""
_by_default = False
"""Whether signals do what they do by default."""


def listen(*numbers: signal.Signals) -> None:
    """Note these signals from here on, and any that waited.

    The launcher starts ranks with SIGTERM blocked, so that a signal that comes while Python starts
    waits. Unblocked, it would kill the rank before anything could heed it. In a thread that can set
    no handlers this does nothing.
    """
    if not can_be_set():
        return
    # `nohup` starts a program with SIGHUP ignored, which means just that.
    ignored = {n for n in numbers if n == signal.SIGHUP and signal.getsignal(n) is signal.SIG_IGN}
    _numbers.update({*numbers} - ignored)
    handle(_numbers, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _numbers)


def listen_to_interrupts(end: Callable[[], None]) -> None:
    """Have a first SIGINT ask the run to stop, and a second one call `end`.

    A thread waits for the signal, which is blocked in all others: the main thread would act on it
    only once it returns from a collective, or from the write of a file. Child processes inherit the
    block, so that a terminal's Ctrl-C does not end the helpers that a last save needs.

    A shell starts background jobs of a script with SIGINT ignored; they do not listen.

    Args:
        end: ends the process; called in that thread.
    """
    if not can_be_set() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def wait() -> None:
        asked = False
        while True:
            signal.sigwait({signal.SIGINT})
            if _by_default:
                _thread.interrupt_main()
            elif asked and not _over:
                end()
            elif not _over:
                asked = True
                _note(signal.SIGINT, None)
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    say_error(ONCE)

    threading.Thread(target=wait, name="Ctrl-C", daemon=True).start()


def heeded() -> frozenset[signal.Signals]:
    """The signals that ask this run to stop, and that its helper processes must not see."""
    return frozenset(_numbers) | {signal.SIGINT}


def close() -> None:
    """Ignore the signals from here on: the run has ended, and its process is on the way out.

    Python restores the default action of signals before it ends. A stop signal that comes that
    late, relayed by another host for example, would then kill a rank that had ended in order.
    """
    global _over
    _over = True
    handle(_numbers, signal.SIG_IGN)


def ignore_no_more() -> None:
    """Let the signals end the process, as they do by default (`--no-exit-signal-handler`)."""
    global _by_default
    _by_default = True
    handle(_numbers, signal.SIG_DFL)
    if _asked is not None:
        signal.raise_signal(_asked)


def hand_over(handler: Any) -> None:
    """Have Megatron's handler know of signals that came before it, and of all our signals.

    Args:
        handler: Megatron's DistributedSignalHandler, which asks all ranks at the end of each step.
    """
    global _handler
    _handler = handler
    handler._signal_received = _asked is not None
    listen()


def enter_where_possible(enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Megatron's `DistributedSignalHandler.__enter__`, which sets a handler in any thread and so
    fails in all but the main one."""

    def enter_or_leave(handler: Any) -> Any:
        if can_be_set():
            return enter(handler)
        handler._signal_received, handler.released = False, True
        return handler

    return enter_or_leave


def remember_told(ask_all: Callable[[Any], list[int]]) -> Callable[[Any], list[int]]:
    """Megatron's `signals_received`, whose answer is kept for `by`."""

    def signals_received(handler: Any) -> list[int]:
        received = ask_all(handler)
        _told[:] = [rank for rank, was_told in enumerate(received) if was_told]
        return received

    return signals_received


def any_rank_asked() -> bool:
    """Whether any rank was asked to stop: the same answer on all, who must all call this."""
    return _handler is not None and any(_handler.signals_received())


def by() -> str:
    """What stops the run, in words for the end of a clause; empty if no signal does."""
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
