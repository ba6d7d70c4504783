"""One attribute of Megatron or torch that a run replaces: found, wrapped, put in place once.

hooks.py is the list.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.evaluation.held_out import HeldOut
from megatron_mlra.fault_tolerance import heartbeat, helper_processes
from megatron_mlra.fault_tolerance.run_lock import RunLock
from megatron_mlra.training import arguments, curves, progress


@dataclass
class Run:
    """What wrappers know of their run.

    `args` is parsed before `BEFORE_CHECKS` is applied. All fields are known, and `args` is
    validated, before `BEFORE_TRAINING` is applied.

    Attributes:
        args: the run's arguments.
        on_cpu: whether there is no GPU.
        lock: of the folder `--save`; None without that flag.
        shape: the model's sizes.
        hosts: name of each rank's host.
        new_multi_token: whether the run has layers of multi-token prediction, and the checkpoint
            that it loads has none.
    """

    args: Namespace
    on_cpu: bool = False
    lock: RunLock | None = None
    shape: ModelDescription | None = None
    hosts: list[str] = field(default_factory=list)
    new_multi_token: bool = False

    @functools.cached_property
    def progress(self) -> progress.Progress:
        """The printed lines of the run, and its progress bar."""
        return progress.Progress(self.args, self.shape)

    @functools.cached_property
    def held_out(self) -> HeldOut:
        """The sets that are scored behind the run's last step."""
        return HeldOut(self.args, arguments.run_folder(self.args), curves.record)

    @functools.cached_property
    def watch(self) -> heartbeat.Watch | None:
        """The watch over hanging ranks; None for a run without one."""
        return heartbeat.watch(self.args, arguments.run_folder(self.args), self._leave_folder)

    def _leave_folder(self) -> None:
        helper_processes.kill_from_thread()
        if self.lock:
            self.lock.release_within(5)


Wrapper = Callable[[Any, Run], Any]


@dataclass(frozen=True)
class Hook:
    """One attribute that a run replaces.

    Attributes:
        target: the attribute's dotted name, through modules and classes.
        why: the reason, one line.
        by: functions of (the attribute's value, the run) that return the new value. The first one
            gets Megatron's or torch's value, each later one the result before it. A function that
            returns its argument changes nothing.
    """

    target: str
    why: str
    by: tuple[Wrapper, ...]

    def find(self) -> tuple[Any, str]:
        """The module or class that holds the target, and the target's name in it.

        Raises:
            ImportError, AttributeError: the installed version has no such target.
        """
        place, _, name = self.target.rpartition(".")
        owner = pkgutil.resolve_name(place)
        getattr(owner, name)
        return owner, name


def instead(replacement: Any) -> Wrapper:
    """A wrapper that puts `replacement` in place, whatever the target's value was."""
    return lambda _, run: replacement


_applied: set[str] = set()


def apply(hooks: tuple[Hook, ...], run: Run) -> None:
    """Put `hooks` in place, for the life of the process.

    Raises:
        RuntimeError: one of the hooks is in place already; then no hook is put in place.
        ImportError, AttributeError: the installed version has no such target.
    """
    targets = [hook.target for hook in hooks]
    again = [name for name in targets if name in _applied or targets.count(name) > 1]
    if again:
        raise RuntimeError(f"{again[0]} is replaced already: a process can start one run")
    places = [hook.find() for hook in hooks]
    for hook, (owner, name) in zip(hooks, places, strict=True):
        _applied.add(hook.target)
        before = after = getattr(owner, name)
        for wrap in hook.by:
            after = wrap(after, run)
        if after is not before:
            is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
            setattr(owner, name, staticmethod(after) if is_static else after)
