"""What the hosts of a run are told of each other, from what each of them says."""

import re

import pytest

from megatron_mlra.launch.hosts import LATE, SILENT, Call, Judge


def call(host: str, beat: int = 1, nodes: str = "2", run: str = "run", **other) -> Call:
    return Call(host, 1, nodes, run, beat, **other)


def judge(*rounds: tuple[float, dict[int, Call]]) -> Judge:
    """A judge that has heard these rounds."""
    it = Judge(900, 0.0)
    for now, calls in rounds:
        it.read(calls, now)
    return it


def test_a_whole_run_makes_no_news():
    rounds = [(float(n), {1: call("a", n), 2: call("b", n)}) for n in range(200)]
    assert judge(*rounds).news.lines == []


def test_a_silent_host_is_named_once_and_may_come_back():
    silent = [(n, {1: call("a", n), 2: call("b", 7)}) for n in range(60)]
    it = judge(*silent)
    assert len(it.news.lines) == 1 and it.news.code is None
    assert re.match(f"host b gives no sign of life for {SILENT + 1:.0f} s; ", it.news.lines[0])
    # Another launcher there takes its place.
    it.read({1: call("a", 61), 2: call("b", 7), 3: call("b", 1)}, 61.0)
    assert len(it.news.lines) == 1 and it.news.code is None


def test_a_launcher_that_is_started_again_counts_once():
    rounds = [(n, {1: call("a", n), 2: call("b", n)}) for n in range(5)]
    rounds += [(n, {1: call("a", n), 2: call("b", 4), 3: call("b", n)}) for n in range(5, 60)]
    assert judge(*rounds).news.lines == []


def test_missing_hosts_are_asked_for_once():
    it = judge(*((n, {1: call("a", n, "3"), 2: call("b", n, "3")}) for n in range(200)))
    (line,) = it.news.lines
    assert line.startswith(f"1 of 3 hosts are missing after {LATE:.0f} s; here: a, b.")


def test_a_stop_reaches_all():
    assert judge((1.0, {1: call("a"), 2: call("b", asked="SIGTERM")})).news.asked == (
        "SIGTERM (host b)"
    )


def test_the_first_reason_ends_all():
    ended = call("b", code=2, why="rank 1 ended with exit code 2: no such file")
    it = judge((1.0, {1: call("a"), 2: ended}), (2.0, {1: call("a", 2, code=1, why="x"), 2: ended}))
    assert it.news.code == 2
    assert it.news.lines == ["host b ended: rank 1 ended with exit code 2: no such file"]
    assert judge((1.0, {1: call("a"), 2: call("b", code=0)})).news.code is None


@pytest.mark.parametrize(
    ("calls", "line"),
    [
        (
            {1: call("a"), 2: call("b", nodes="3")},
            "NODES is 2 on host a and 3 on host b; give all hosts the same",
        ),
        (
            {1: call("a"), 2: call("b", run="other")},
            "RDZV_ID is run on host a and other on host b; give all hosts the same",
        ),
        (
            {1: call("a"), 2: call("b"), 3: call("c")},
            "NODES is 2, but more have come: a, b, c",
        ),
    ],
)
def test_hosts_that_disagree(calls, line):
    it = judge((1.0, calls))
    assert (it.news.code, it.news.lines) == (2, [line])
