"""One line, before a program falls silent: torch is being imported, which takes seconds."""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from types import ModuleType

from megatron_mlra.command_line.output import say_error


class _Announcer:
    """A finder of modules that finds none. It sees when torch is first looked for, wherever that
    is, so that nothing is said by a command that ends before."""

    def __init__(self, line: str) -> None:
        self.line = line

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> None:
        """Python's question for a module."""
        if name == "torch":
            # A new list: Python is on its way through the old one, and would leave out the finder
            # behind this one, which may be another tool's hook on torch.
            sys.meta_path = [each for each in sys.meta_path if each is not self]
            if PathFinder.find_spec(name) is not None:
                say_error(self.line)


def announce_loading(what: str, takes: str) -> None:
    """Say `loading WHAT: TAKES ...` on standard error when torch begins to be imported.

    Says nothing if torch is imported already, and on all ranks but the first.
    """
    if "torch" in sys.modules or os.environ.get("RANK", "0") != "0":
        return
    sys.meta_path[:] = [each for each in sys.meta_path if not isinstance(each, _Announcer)]
    sys.meta_path.insert(0, _Announcer(f"loading {what}: {takes}, more on a busy machine"))
