"""Hosts that fail, refuse or do not come: the others name them, and do not wait in silence."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from support.cluster_jobs import LIVES, PAIR, Cluster

pytestmark = pytest.mark.cluster


def until(out: Path, pattern: str, seconds: float = 240) -> None:
    """Wait until a file matches a pattern."""
    deadline = time.monotonic() + seconds
    while not re.search(pattern, out.read_text(), re.M):
        assert time.monotonic() < deadline, f"never said {pattern!r}: {out.read_text()}"
        time.sleep(0.2)


def power_failure(cluster: Cluster) -> None:
    """A host's power fails in a step: the other host names it, SLURM starts the job again."""
    flags = (*LIVES[:-1], 5, "--hang-timeout-seconds", 0)
    job = cluster.submit("power", *flags, options=(*PAIR, "--nodelist", "node1,node2"))
    job.wait_for(r"^saved step 5 ")
    lost = job.hosts()[1]
    cluster.script("kill", lost)
    try:
        said = rf"^note: host {lost} gives no sign of life for \d+ s; if it does not come back, the"
        job.wait_for(rf"{said} others wait 900 s \(JOIN_TIMEOUT\)")
        job.wait("requeued", lambda: job.fields()["Restarts"] == "1")
    finally:
        cluster.script("start", lost)
    job.wait_for(r"^continuing after step \d+ ")


def refusal(cluster: Cluster) -> None:
    """One host's ranks refuse their command line: all hosts end, and name that host."""
    work = cluster.folder / "work"
    outs = [work / "refusal3.out", work / "refusal4.out"]
    # An address of the first host, which is not that of its own name there.
    meet = {"NODES": 2, "GPUS_PER_NODE": 1, "RDZV_ENDPOINT": "10.77.0.13:29511"}
    flags = ("--data-path", cluster.data)
    one = cluster.launch("node3", outs[0], work / "refusal", *flags, **meet)
    two = cluster.launch("node4", outs[1], work / "refusal", *flags, "--no-such-flag", **meet)
    assert (one.wait(300), two.wait(300)) == (2, 2), [out.read_text() for out in outs]
    said = outs[1].read_text()
    assert re.search(r"^error: host node4: unknown flag --no-such-flag", said, re.M), said
    said = outs[0].read_text()
    assert re.search(
        r"^error: host node4 ended: rank \d ended with exit code 2: unknown flag --no-such-flag",
        said,
        re.M,
    ), said
    assert "Traceback" not in said


def missing(cluster: Cluster) -> None:
    """A host that does not come is asked for; then the first host's launcher is killed."""
    work = cluster.folder / "work"
    outs = [work / "missing3.out", work / "missing4.out"]
    meet = {"NODES": 3, "GPUS_PER_NODE": 1, "RDZV_ENDPOINT": "node3:29512"}
    hosts = ("node3", "node4")
    launchers = [
        cluster.launch(host, out, work / "missing", **meet)
        for host, out in zip(hosts, outs, strict=True)
    ]
    for host, out in zip(hosts, outs, strict=True):
        # As Debian installs a host.
        until(out, rf"^note: {host} is a loopback address on {host} itself; other hosts are given")
        until(
            out,
            r"^note: 1 of 3 hosts are missing after 60 s; here: node3, node4\. On the others"
            r" compare NODES, RDZV_ENDPOINT and RDZV_ID; waiting 900 s in all \(JOIN_TIMEOUT\)$",
        )
    launchers[0].kill()
    assert launchers[1].wait(300) == 1, outs[1].read_text()
    until(outs[1], r"^error: host node3, where all meet \(node3:29512\), (is gone|gives no sign)")
    launchers[0].wait(120)


def wrong_first_host(cluster: Cluster) -> None:
    """RDZV_ENDPOINT names a host where nothing listens: said soon, and again at the end."""
    out = cluster.folder / "work" / "wrong.out"
    meet = {"NODES": 2, "RDZV_ENDPOINT": "head:29513", "JOIN_TIMEOUT": 30}
    launcher = cluster.launch("node4", out, cluster.folder / "work" / "wrong", **meet)
    assert launcher.wait(240) == 1, out.read_text()
    note, error = out.read_text().splitlines()[-2:]
    assert note.startswith("note: nothing answers at RDZV_ENDPOINT head:29513 yet; is it the first")
    assert error.startswith("error: nothing answered at RDZV_ENDPOINT head:29513 for 30 s")


CASES = [power_failure, refusal, missing, wrong_first_host]


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_hosts(cases, case):
    cases[case].result()
