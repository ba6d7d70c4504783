"""Shared by tests: the oracle, emulators, tiny models, and drivers of real process groups.

pytest finds this package by `pythonpath` in pyproject.toml; processes that tests start find it by
the PYTHONPATH of `ENV`.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""

CONFIGS = ROOT / "megatron_mlra" / "presets"

ENV = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "default",
    "PYTHONPATH": os.pathsep.join(
        filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    ),
}
"""The environment of a process that imports this package."""
