"""Runs tests of Triton kernels under Triton's interpreter, on the CPU.

Triton decides at import whether to interpret. So such a test file runs itself in a child process
with TRITON_INTERPRET=1, and other tests of the session are not affected.
"""

import os
import subprocess
import sys

from support import ENV

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file: str) -> str:
    """Run a test file in a child that interprets; returns the child's output.

    Raises:
        AssertionError: a test failed.
    """
    # Plugins that the child does not need, and that take two seconds to import.
    without = [
        part for name in ("hypothesispytest", "xdist", "anyio") for part in ("-p", f"no:{name}")
    ]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-x", "--durations=5", *without, file],
        env=ENV | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    return child.stdout
