"""What all tests share: one thread per process, long files first, a driver run to its end."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before torch is imported: threads of small operations wait for each other, and burn a CPU in doing
# so, many times longer than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from support import ROOT
from support.disks import disk
from support.parsers import read_help_once
from support.programs import program
from support.runs import Entry
from support.warm import write_python

# A shell's job in the background ignores these, and so would every process that the tests start.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, 0)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

LONG = (
    "distributed/test_parity.py",
    "e2e/test_reproduce.py",
    "e2e/test_hangs.py",
    "e2e/test_launch.py",
    "e2e/test_faults.py",
    "e2e/test_training.py",
    "distributed/test_inference.py",
    "e2e/test_documented_commands.py",
    "unit/kernels/test_mlra_kernels_interpreter.py",
    "fuzz/test_fuzz.py",
    "distributed/test_dry_run.py",
    "e2e/test_bad_input.py",
    "distributed/test_checkpoint.py",
    "unit/kernels/test_kernel_properties.py",
)
"""Files that take longest, the longest first: one that begins last is waited for by all workers."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of LONG."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONG)}
    missing = [path for path in places if not path.is_file()]
    assert not missing, f"LONG in {__file__} names {missing[0]}, which is not there"
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/fuzz."""
    group = parser.getgroup("fuzz", "inputs that are nearly right (tests/fuzz)")
    group.addoption("--fuzz-inputs", type=int, default=300, help="how many (default: 300)")
    group.addoption("--fuzz-seed", type=int, default=0, help="which (default: 0)")


@pytest.fixture(scope="session", autouse=True)
def _parsers() -> None:
    """Parsers of Megatron's flags in a millisecond each, where any are made."""
    if "megatron.training.argument_utils" in sys.modules:
        read_help_once()


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all test processes of a session."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def entry(session: Path) -> Iterator[Entry]:
    """The training entry."""
    entry = Entry(session)
    yield entry
    entry.close()


@pytest.fixture(scope="session")
def warm_python(session: Path, entry: Entry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that stands for this Python, and begins with Megatron imported."""
    return write_python(tmp_path_factory.mktemp("warm"), session)


@pytest.fixture(scope="session")
def warm_mlra(warm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command `mlra`, of a Python that begins with Megatron imported."""
    path = tmp_path_factory.mktemp("bin") / "mlra"
    _, _, text = program("mlra").read_text().partition("\n")
    path.write_text(f"#!{warm_python}\n{text}")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def run_driver(
    entry: Entry, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, float], Path]:
    """Run one of the drivers to its end; returns the folder of its results."""

    def run(name: str, timeout: float) -> Path:
        folder, said = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp(f"{name}-said")
        job = {"module": f"support.drivers.{name}", "timeout": timeout}
        done = entry.run(said, folder, **job)
        assert done.code == 0, f"{done.code}: {done.err[-3000:]}"
        return folder

    return run


@pytest.fixture(scope="module")
def groups():
    """Process groups of a world of one, for modules that are built in the test's process."""
    from support.modules import world_of_one

    with world_of_one() as collection:
        yield collection


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in which files can be made, but nothing can be written into them."""
    with disk(tmp_path / "full", "4k") as full:
        (full / "fill").write_bytes(bytes(4096))
        yield full
