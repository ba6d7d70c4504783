"""How torch's threads wait. Imported before torch, so this file uses the standard library alone."""

from __future__ import annotations

import os


def wait_passively() -> None:
    """Have OpenMP's threads sleep while they wait for each other, unless OMP_WAIT_POLICY is set.
    Call it before torch is imported: OpenMP reads the variable once.

    Threads that wait actively occupy a core each. On a busy machine a step of a small model then
    takes many times as long (12 times for a generated token).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
