"""Who hangs, judged from what ranks said: cases that are hard to bring about in processes."""

from dataclasses import replace

from megatron_mlra.fault_tolerance.hang import Beat, Heard, Verdict, judge

WELL = Beat(
    rank=0,
    host="n0",
    pid=7,
    device="GPU 0",
    number=9,
    step=12,
    marks=40,
    phase="forward",
    bounded=True,
    waiting=False,
    at="model.py:1 (f)",
    idle=0.5,
)


def job(size: int = 8, silent: float = 1.0, **changes) -> list[Heard]:
    return [Heard(replace(WELL, rank=r, host=f"n{r // 4}", **changes), silent) for r in range(size)]


def changed(heard: Heard, silent: float | None = None, **changes) -> Heard:
    return Heard(replace(heard.beat, **changes), heard.silent if silent is None else silent)


def test_a_job_that_moves_is_left_alone():
    assert judge(job(), 100) is None
    # All save, compile or build indices, however long it takes.
    assert judge(job(bounded=False, idle=1e6), 100) is None
    # A wait that is not yet long.
    assert judge(job(bounded=False, waiting=True, idle=90.0), 100) is None


def test_a_node_that_died_is_named_whole_and_before_its_victims():
    heard = job(waiting=True, idle=101.0)
    heard[4:] = [changed(one, silent=99.0, waiting=False, idle=0.1) for one in heard[4:]]
    found = judge(heard, 100)
    assert found.ranks == (4, 5, 6, 7)
    assert found.line.startswith(
        "rank 4 (host n1, pid 7, GPU 0) hangs: no sign of life for 99 s; last at step 12, forward;"
    )


def test_more_ranks_than_a_line_holds():
    heard = job(16)
    heard[2:] = [changed(one, silent=200.0) for one in heard[2:]]
    found = judge(heard, 100)
    assert found.ranks == tuple(range(2, 16))
    assert (
        found.line.endswith("; and 10 more ranks on n1, n2, n3") and found.line.count("hangs") == 4
    )
    assert Verdict.read(found.write()) == found


def test_the_one_that_does_not_wait_is_named_even_if_it_is_ahead():
    heard = job(waiting=True, idle=101.0)
    heard[5] = changed(heard[5], waiting=False, marks=44, phase="loading data")
    found = judge(heard, 100)
    assert found.ranks == (5,)
    assert (
        "alive, but no progress for 102 s; at step 12, loading data, model.py:1 (f)" in found.line
    )


def test_a_slow_save_counts_only_when_others_wait_for_it():
    heard = job(bounded=False, phase="saving", idle=500.0)
    assert judge(heard, 100) is None
    heard[1:] = [changed(one, waiting=True) for one in heard[1:]]
    assert judge(heard, 100).ranks == (0,)


def test_one_on_a_path_of_its_own_is_named():
    # It works on, while the others wait for it.
    heard = job(waiting=True, idle=101.0)
    heard[3] = changed(heard[3], waiting=False, idle=0.2)
    assert judge(heard, 100).ranks == (3,)


def test_where_all_wait_the_furthest_behind_is_named_and_no_more_is_claimed():
    heard = job(waiting=True, idle=101.0)
    heard[6] = changed(heard[6], marks=39)
    found = judge(heard, 100)
    assert found.ranks == (6,)
    assert found.line.startswith("every rank waits in communication; furthest behind: rank 6 ")
