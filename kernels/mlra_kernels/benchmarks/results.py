"""Results as JSON files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(file: str | Path, value: Any) -> None:
    """Write aside, then rename: a run that is interrupted leaves an earlier file as it was."""
    path = Path(file)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    try:
        with partial.open("x") as opened:
            json.dump(value, opened, indent=1)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
