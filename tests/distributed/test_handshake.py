"""Ranks on several hosts meet: real processes, host names and mounts, and the launcher's store."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from support import ENV

SAME = {
    "code": {"the version of torch": "2.11.0"},
    "arguments": {"--lr": "0.002", "--num-layers": "4"},
    "data": {"the size of /data/text.bin": "4,096 bytes"},
}


@pytest.fixture(scope="module")
def driver(warm_python):
    """Forks worlds from a process that has torch imported."""
    process = subprocess.Popen(
        [warm_python, "-m", "support.drivers.handshake"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    yield process
    process.stdin.close()
    process.wait(300)


@pytest.fixture
def meet(driver, tmp_path):
    """Runs ranks to the end of their meeting, two on each host; `how` says what differs."""
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("namespaces cannot be made here")

    def run(ranks: int, how: dict[int, dict], seconds: float = 30) -> list[dict]:
        each = [{"host": f"node{rank // 2 + 1}", "fingerprint": SAME} for rank in range(ranks)]
        for rank, what in how.items():
            each[rank] |= what
        driver.stdin.write(json.dumps([str(tmp_path), seconds, each]) + "\n")
        driver.stdin.flush()
        said = json.loads(driver.stdout.readline())
        assert os.listdir(tmp_path) == []
        return said

    return run


def the_line(said: list[dict]) -> str:
    """The one line that all ranks ended with."""
    assert len({answer["line"] for answer in said}) == 1, said
    return said[0]["line"]


def test_eight_ranks_meet_in_a_moment(meet):
    said = meet(8, {})
    hosts = [f"node{rank // 2 + 1}" for rank in range(8)]
    assert [answer["hosts"] for answer in said] == [hosts] * 8
    # Far from the seconds that ranks are waited for.
    assert max(answer["seconds"] for answer in said) < 20


DIFFERENT = {
    "arguments": (
        {"arguments": {"--lr": "0.001", "--num-layers": "4"}},
        "--lr: 0.001, where rank 0 has 0.002",
    ),
    "code": (
        {"code": {"the version of torch": "2.10.0"}, "arguments": {}},
        "the version of torch: 2.10.0, where rank 0 has 2.11.0",
    ),
    "data": (
        {"data": {"the size of /data/text.bin": "8,192 bytes"}},
        "the size of /data/text.bin: 8,192 bytes, where rank 0 has 4,096 bytes",
    ),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_hosts_that_disagree(meet, kind):
    changed, what = DIFFERENT[kind]
    line = the_line(meet(4, {3: {"fingerprint": SAME | changed}}))
    assert line == (
        f"rank 3 (host node2) differs from rank 0 (host node1) in {what}; start every host with the"
        " same command, code and data"
    )


def test_ranks_that_did_not_look_at_the_data_do_not_differ(meet):
    without = {kind: SAME[kind] for kind in ("code", "arguments")}
    assert "hosts" in meet(2, {1: {"fingerprint": without}})[1]


def test_many_differences_stay_one_line(meet):
    other = {f"--flag-{i}": "1" for i in range(9)}
    changed = {"fingerprint": SAME | {"arguments": SAME["arguments"] | other}}
    line = the_line(meet(4, {2: changed, 3: changed}))
    assert line.startswith("rank 2 (host node2) differs from rank 0 (host node1) in --flag-0: 1,")
    assert "where rank 0 has missing; and in 6 more; 1 other rank differs too; start" in line


def test_a_folder_that_is_not_shared(meet, tmp_path):
    line = the_line(meet(4, {2: {"blind": True}, 3: {"blind": True}}))
    assert line == (
        f"--save {tmp_path} is not shared: ranks 2, 3 (host node2) do not see what rank 0 (host"
        " node1) writes there; use a folder that all hosts see"
    )


def test_ranks_that_do_not_come(meet):
    line = the_line(meet(4, {2: {"absent": True}, 3: {"absent": True}}, seconds=8))
    assert line == (
        "ranks 2, 3 (node number 1) did not come within 8 s (--distributed-timeout-minutes); those"
        " that did: ranks 0, 1 (host node1); look at the output on the hosts that are missing"
    )


def test_a_rank_that_ends_after_it_came(meet):
    said = meet(4, {3: {"dies": True}}, seconds=8)
    assert said.pop() is None
    assert "rank 3 (host node2) did not come within 8 s" in the_line(said)


def test_all_ranks_end_with_what_rank_0_is_refused(meet):
    line = "--save /runs/a is in use by another run"
    assert the_line(meet(4, {0: {"refuses": line}})) == line
