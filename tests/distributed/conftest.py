"""Let the distributed tests import their drivers' helpers by name, and run the drivers."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def run_driver(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], Path]:
    """Run one of the drivers to its end; returns the folder of its results."""

    def run(name: str, timeout: float) -> Path:
        folder = tmp_path_factory.mktemp(name)
        driver = Path(__file__).with_name(f"{name}.py")
        command = [sys.executable, "-W", "ignore", str(driver), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    return run
