"""The run's folder: one that not all hosts see, and one that another run uses, are refused."""

from __future__ import annotations

import pytest

from jobs import LIVES, ONE, PAIR, Cluster

pytestmark = pytest.mark.cluster


def unshared_save(cluster: Cluster) -> None:
    """Each host has a disk of its own where --save is: refused, and the blind host named."""
    # Mounted on each host from another place.
    save = cluster.folder / "local" / "unshared"
    job = cluster.submit("unshared", *LIVES, options=PAIR, save=save)
    assert job.end(300) == "FAILED"
    first, second = job.hosts()
    assert f"--save {save} is not shared: rank 1 (host {second}) does not see" in job.said
    assert f"(host {first}) writes there; use a folder that all hosts see" in job.said
    assert job.fields()["ExitCode"] == "2:0" and "restart 1 of" not in job.said


def second_launch(cluster: Cluster) -> None:
    """A second job on one folder is refused and names the first, which goes on."""
    first = cluster.submit("twice", *LIVES, options=ONE)
    first.wait_for(r"^step 3/")
    second = cluster.submit("twice", *LIVES, options=ONE, output="twice-second")
    assert second.end(300) == "FAILED"
    (host,) = first.hosts()
    assert f"host {host}, pid " in second.said and f", job {first.number}, since" in second.said
    assert second.fields()["ExitCode"] == "2:0" and "restart 1 of" not in second.said
    said = first.said.count("\nstep ")
    first.wait("going on", lambda: first.said.count("\nstep ") > said, 60)
    first.cancel()
    assert first.end() == "CANCELLED"
    assert "is saved; continue with" in first.said


CASES = [unshared_save, second_launch]


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_shared_folder(cases, case):
    cases[case].result()
