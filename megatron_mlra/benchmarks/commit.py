"""The commit that a benchmark's report names."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """Short hash of the checkout of this package, with `-dirty` for changed files; 'unknown'
    without a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run([*git, "--exclude=*"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
