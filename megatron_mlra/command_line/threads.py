"""How torch's threads wait. Imported before torch, so it needs the standard library alone."""

from __future__ import annotations

import os


def wait_passively() -> None:
    """Have OpenMP's threads sleep while they wait for each other, unless the environment says
    otherwise. Called before torch is imported, which reads it once.

    Threads that wait actively hold a core each: on a busy machine a step of a small model takes
    many times as long (12 times for a generated token).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
