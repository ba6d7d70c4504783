"""Signals that ask a run to stop, heeded from the entry's first line to its last step.

This module is imported before torch, so it needs the standard library alone. In another thread
than the main one no signal is heeded: whoever started the thread decides what they do.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from megatron_mlra.command_line.signals import can_be_set, handle

_numbers: set[signal.Signals] = set()
_asked: signal.Signals | None = None
_handler: Any = None
_told: list[int] = []


def listen(*numbers: signal.Signals) -> None:
    """Note these signals from here on, and any that waited.

    The launcher starts ranks with SIGTERM blocked, so that a signal that comes while Python starts
    waits. Unblocked, it would kill the rank before anything could heed it. In a thread that can set
    no handlers this does nothing.
    """
    if not can_be_set():
        return
    _numbers.update(numbers)
    handle(_numbers, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _numbers)


def close() -> None:
    """Ignore the signals from here on: the run has ended, and its process is on the way out.

    Python restores the default action of signals before it ends. A stop signal that comes that
    late, relayed by another host for example, would then kill a rank that had ended in order.
    """
    handle(_numbers, signal.SIG_IGN)


def ignore_no_more() -> None:
    """Let the signals end the process, as they do by default (`--no-exit-signal-handler`)."""
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
