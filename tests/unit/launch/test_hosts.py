"""What the hosts of a run are told of each other, from what each of them says."""

import json
import re
from dataclasses import asdict
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from megatron_mlra.launch.call import COUNT, key
from megatron_mlra.launch.control import say
from megatron_mlra.launch.hosts import LATE, SILENT, Call, Judge, News, calls_in, read_news
from megatron_mlra.launch.network import parse_endpoint


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", r"several hosts need RDZV_ENDPOINT \(--rdzv-endpoint\): HOST:PORT of one of them"),
        ("node", "RDZV_ENDPOINT node is not HOST:PORT"),
        ("node:0", "RDZV_ENDPOINT node:0 is not HOST:PORT"),
    ],
)
def test_where_hosts_meet(given, said):
    with pytest.raises(ValueError, match=said):
        parse_endpoint(given)


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


def test_a_second_launcher_of_a_host_is_told_to_end():
    """The later one alone, behind some seconds: it may replace one that was just killed."""

    def calls(n: int) -> dict[int, Call]:
        ended = {"code": 2, "why": "started twice"} if n > 20 else {}
        return {1: call("a", n), 2: call("b", n), 3: call("a", n, **ended)}

    rounds = [(float(n), calls(n)) for n in range(40)]
    assert judge(*rounds[:5]).news == News()
    assert judge(*rounds).news == News(spare=[3])
    # As tests do, as many launchers as hosts on one machine.
    assert (
        judge(*((float(n), {1: call("a", n), 2: call("a", n)}) for n in range(40))).news == News()
    )


def test_a_host_that_has_just_died_is_not_one_too_many():
    """The one in its place may come before its silence is noticed."""
    rounds = [(float(n), {1: call("a", n), 2: call("b", n)}) for n in range(5)]
    rounds += [
        (float(n), {1: call("a", n), 2: call("b", 4)} | ({3: call("c", n)} if n > 7 else {}))
        for n in range(5, 40)
    ]
    news = judge(*rounds).news
    assert news.code is None and len(news.lines) == 1 and "host b gives no sign" in news.lines[0]


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


def test_hosts_of_one_number():
    """Refused, unless it is 0 on all hosts, which is no number. A host that has just died may have
    the number of the one in its place; a second launcher on a host ends alone."""
    said = "NODE_RANK (--node-rank) is 1 on the hosts b, c; give each host its own, or all 0"

    def calls(*numbers: int, beat: int = 1) -> dict[int, Call]:
        there = zip("abc", numbers, strict=False)
        return {
            n: call(host, beat, "3", node_rank=number) for n, (host, number) in enumerate(there, 1)
        }

    assert judge((1.0, calls(0, 0, 0))).news == judge((1.0, calls(2, 1, 0))).news == News()
    assert judge((1.0, calls(0, 1, 1))).news == News(code=2, lines=[said])
    dead = {2: call("b", 1, "3", node_rank=1)}
    assert judge((1.0, calls(0, 1)), (2.0, calls(0, 1, 1, beat=2) | dead)).news == News()
    twice = {4: call("a", 1, "3", node_rank=1)}
    assert judge((1.0, calls(0, 1, 2) | twice)).news == News()


def test_what_is_no_call_in_the_store_is_left_out(capfd):
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=9), wait_for_workers=False)
    good = asdict(call("a"))
    odd = [
        "no json",
        "[" * 10**5,
        "[]",
        json.dumps({"asked": "", "code": None, "beat": 1}),
        json.dumps({"asked": "", "code": None}),
        *(
            json.dumps(good | change)
            for change in (
                {"nodes": "many"}, {"nodes": 2}, {"beat": "1"}, {"host": None}, {"code": 2**40},
                {"why": "x" * 10**5}, {"pid": True}, {"node_rank": "1"},
            )
        ),
    ]  # fmt: skip
    for number, text in enumerate([*odd, json.dumps(good | {"new": "field"})], 1):
        store.set(key(number), text)
    store.add(COUNT, 1 << 40)
    notes = []
    assert calls_in(store, notes.append) == {len(odd) + 1: call("a")}
    assert len(set(notes)) == 2 and all("left out" in n or "number of calls" in n for n in notes)
    wrong = '{"asked": "", "code": null, "lines": [], "spare": ["1"]}'
    for text in (
        "[]",
        '{"asked": "", "code": 2, "lines": []}',
        '{"asked": 1, "code": null}',
        wrong,
    ):
        with pytest.raises(ValueError, match="news"):
            read_news(text)
    assert read_news(json.dumps(asdict(News("x", 2, ["y"], [3])))) == News("x", 2, ["y"], [3])
    say("host a\x1b[2J\nb\ud800 é")
    assert capfd.readouterr().err == "host a\\x1b[2J\\nb\\ud800 é\n"
