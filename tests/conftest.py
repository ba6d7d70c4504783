"""What all tests share: running a driver of support/drivers to its end."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support import ENV


@pytest.fixture(scope="session")
def run_driver(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], Path]:
    """Run one of the drivers to its end; returns the folder of its results."""

    def run(name: str, timeout: float) -> Path:
        folder = tmp_path_factory.mktemp(name)
        command = [sys.executable, "-W", "ignore", "-m", f"support.drivers.{name}", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENV)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    return run


@pytest.fixture(scope="module")
def groups():
    """Process groups of a world of one, for modules that are built in the test's process."""
    from support.modules import world_of_one

    with world_of_one() as collection:
        yield collection
