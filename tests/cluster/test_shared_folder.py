"""The run's folder: one that not all hosts see, and one that another run uses, are refused."""

from __future__ import annotations

import pytest

from support.cluster_jobs import LIVES, ONE, PAIR, Cluster

pytestmark = pytest.mark.cluster


def unshared_save(cluster: Cluster) -> None:
    """Each host has a disk of its own where --save is: refused, and the blind host named."""
    # Mounted on each host from another place.
    save = cluster.folder / "local" / "unshared"
    # By the letters of its address node3, whose own name is a loopback address, would come first.
    pair = (*PAIR, "--nodelist", "node2,node3")
    job = cluster.submit("unshared", *LIVES, options=pair, save=save)
    assert job.end(300) == "FAILED"
    first, second = job.hosts()
    assert f"--save {save} is not shared: rank 1 (host {second}) does not see" in job.said, job.said
    assert f"(host {first}) writes there; use a folder that all hosts see" in job.said
    assert job.fields()["ExitCode"] == "2:0" and "restart 1 of" not in job.said


def second_launch(cluster: Cluster) -> None:
    """A second launch on a job's folder is refused and names the job, which goes on."""
    job = cluster.submit("twice", *LIVES, options=ONE)
    job.wait_for(r"^step 3/")
    # On a host that SLURM does not give away: the second launch waits for no node.
    out = cluster.folder / "work" / "twice-second.out"
    flags = ("--data-path", cluster.data, *LIVES)
    second = cluster.launch("head", out, job.save, *flags, GPUS_PER_NODE=1, MAX_RESTARTS=3)
    assert second.wait(240) == 2, out.read_text()
    (host,) = job.hosts()
    said = out.read_text()
    assert f"host {host}, pid " in said and f", job {job.number}, since" in said
    assert "restart 1 of" not in said
    steps = job.said.count("\nstep ")
    job.wait("going on", lambda: job.said.count("\nstep ") > steps)
    job.cancel()
    assert job.end() == "CANCELLED"
    assert "is saved; continue with" in job.said


CASES = [unshared_save, second_launch]


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_shared_folder(cases, case):
    cases[case].result()
