"""Shared by tests: the oracle, emulators, tiny models, and drivers of real process groups.

pytest finds this package by `pythonpath` in pyproject.toml; processes that tests start find it by
the PYTHONPATH of `ENV`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Containers often say that no bytecode is kept. Then every process of the tests would compile again
# what it imports, which is half the time of importing torch.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

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
