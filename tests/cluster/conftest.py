"""A real SLURM for the tests of this folder; `make test-cluster` runs them, as root.

Jobs run at the same time as far as nodes are free, since most of a job's time is imports: each case
is a function that runs in a thread of its own from the start, and each test waits for one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from support.cluster_jobs import Cluster
from support.runs import write_corpus


@pytest.fixture(scope="session")
def cluster(warm_python):
    """Six nodes, and a tiny corpus and preset in a folder that all of them see. Their Python begins
    with Megatron imported: else imports would take most of the time."""
    # Not in pytest's own folder, whose parents munge distrusts.
    folder = Path(tempfile.mkdtemp(prefix="mlra-cluster-", dir="/var/tmp"))
    cluster = Cluster(folder, warm_python)
    try:
        cluster.script("up", check=True)
        cluster.prepare(write_corpus)
        yield cluster
    finally:
        cluster.script("down")
        if os.environ.get("KEEP_CLUSTER_LOGS"):
            print(f"logs: {folder}")
        else:
            shutil.rmtree(folder)


@pytest.fixture(scope="session")
def cases(cluster, request) -> dict[str, Future]:
    """Name -> what came of that function of a module's CASES, all started together."""
    items = [item for item in request.session.items if "cases" in item.fixturenames]
    functions = {case.__name__: case for item in items for case in item.module.CASES}
    chosen = [functions[item.callspec.params["case"]] for item in items]
    pool = ThreadPoolExecutor(len(chosen))
    started = {function.__name__: pool.submit(cluster.run, function) for function in chosen}
    yield started
    pool.shutdown(cancel_futures=True)


def pytest_sessionstart(session) -> None:
    """Fail at once, rather than in every test, where a cluster cannot be set up."""
    if "cluster" not in session.config.getoption("markexpr").replace("not cluster", ""):
        return
    if os.geteuid():
        raise pytest.UsageError("the cluster's tests need root: sudo make test-cluster")
    missing = [name for name in ("nsenter", "unshare") if shutil.which(name) is None]
    if missing:
        raise pytest.UsageError(f"the cluster's tests need {', '.join(missing)} (util-linux)")
