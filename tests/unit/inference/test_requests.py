"""No request ends the others: values without a meaning are refused, an exception ends its own one.

That requests get what they get alone is test_engine.py's.
"""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mlra.inference import cli
from megatron_mlra.inference.cache import BlockTables, PagePool
from megatron_mlra.inference.engine import Engine
from megatron_mlra.inference.load import LoadOptions, load_model
from megatron_mlra.inference.parallel import TensorParallel, check_tensor_parallel
from megatron_mlra.inference.request import Request
from megatron_mlra.inference.runner import Runner
from megatron_mlra.inference.sampling import SamplingParams, sample
from unit.inference.test_engine import (
    MODEL,
    TENSORS,
    alone,
    engine,
    finish,
    prompts,
    random_tensors,
    text,
)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 1e-40}, "temperature is 1e-40; use 0"),
        ({"temperature": 1e39}, r"temperature is 1e\+39"),
        ({"temperature": -1.0}, "temperature is -1.0; use 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": None}, "temperature is None"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"top_p": 0.0}, "top_p is 0.0; use more than 0"),
        ({"top_p": 1e-46}, "top_p is 1e-46; use more than 0"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_p": True}, "top_p is True"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.0}, "top_k is 2.0; use a whole number of at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; use a whole number of at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; use a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": "8"}, "max_new_tokens is '8'"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"seed": 10**5000}, "seed is "),
        ({"stop": (5,)}, r"stop is \(5,\); use texts"),
        ({"stop": 5}, "stop is 5; use a tuple of str"),
        ({"stop": ("a", "")}, "stop is .*; use texts that are not empty"),
        ({"stop": b"a"}, "stop is b'a'"),
        ({"stop_ids": (1.5,)}, "a token of stop_ids is 1.5"),
        ({"stop_ids": (-1,)}, "a token of stop_ids is -1"),
        ({"stop_ids": "5"}, "stop_ids is '5'; use a tuple of int"),
        ({"stop_ids": None}, "stop_ids is None"),
        ({"logprobs": 5}, "logprobs is 5; use True or False"),
    ],
)
def test_values_out_of_range_or_of_other_types_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_one_stop_text_or_token_is_one_and_numpys_numbers_are_numbers():
    one = SamplingParams(stop="abc", stop_ids=5, top_k=np.int64(3), temperature=np.float32(0.5))
    assert (one.stop, one.stop_ids, one.top_k, one.temperature) == (("abc",), (5,), 3, 0.5)
    assert SamplingParams(stop=["a", "bc"], stop_ids=[1, 2]).stop == ("a", "bc")
    expected = alone([7, 8], SamplingParams(max_new_tokens=20))
    running = engine(detokenize=text)
    stop = text(expected[3:5])
    request = running.submit([7, 8], SamplingParams(max_new_tokens=20, stop=stop))
    finish(running)
    assert (request.finish_reason, request.text) == ("stop", text(expected).partition(stop)[0])


@pytest.mark.parametrize("temperature", [1.2e-38, 1e-30, 1.0, 3e38])
@pytest.mark.parametrize("top_p", [1.2e-38, 0.5, 1.0])
def test_every_temperature_that_is_taken_draws_a_token(temperature, top_p):
    logits = torch.tensor([[0.0, 80.0, -3e38, 79.0]])
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=10**30, seed=2**64 - 1)
    (token,), _ = sample(logits, [params], [3])
    assert 0 <= token < 4
    if top_p < 0.1 or temperature < 0.1:
        assert token == 1


def test_a_row_of_nan_or_infinite_logits_gives_no_token_and_leaves_the_others():
    good, bad = [0.0, 1.0, 0.5], [math.nan, 1.0, 0.0]
    params = [SamplingParams(temperature=1.0, top_p=0.9, logprobs=True, seed=i) for i in range(4)]
    rows = torch.tensor([good, bad, [math.inf, 0.0, 0.0], good])
    tokens, logprobs = sample(rows, params, [5] * 4)
    expected = [sample(rows[i : i + 1], params[i : i + 1], [5])[0][0] for i in (0, 3)]
    assert [tokens[0], tokens[3]] == expected and tokens[1:3] == [-1, -1]
    assert all(math.isfinite(logprobs[i]) for i in (0, 3))
    assert sample(rows, [SamplingParams()] * 4, [5] * 4)[0] == [1, -1, -1, 1]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([3, 61], "token 61 is outside the vocabulary of 61"),
        ("abc", "the prompt is 'abc'; give a list of token ids"),
        (5, "the prompt is 5"),
        (torch.tensor(5), r"the prompt is tensor\(5\); give a list of token ids"),
        (None, "the prompt is None"),
        ([1, "2"], "prompt token '2'"),
        ([1, 2.0], "prompt token 2.0 is outside the vocabulary of 61; use ids from 0 to 60"),
        ([1, None], "prompt token None"),
        ([-1], "prompt token -1"),
        ([True], "prompt token True"),
    ],
)
def test_prompts_that_are_not_tokens_of_the_vocabulary_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        engine().submit(prompt)


def test_prompts_of_arrays_and_tensors_are_taken():
    expected = alone([7, 8], SamplingParams(max_new_tokens=3))
    running = engine()
    same = [np.array([7, 8]), torch.tensor([7, 8]), (7, 8), iter([7, 8])]
    requests = [running.submit(p, SamplingParams(max_new_tokens=3)) for p in same]
    finish(running)
    assert [request.output for request in requests] == [expected] * 4


def test_a_request_longer_than_the_runners_tables_is_refused():
    model = load_model(MODEL, TENSORS.__getitem__, LoadOptions(cache_tokens=1024, page_size=16))
    short = Engine(Runner(model, max_batch=4, max_pages=2), chunk_size=24)
    fits = short.submit(list(range(20)), SamplingParams(max_new_tokens=13))
    with pytest.raises(ValueError, match=r"33 tokens need 3 pages of 16, the runner takes 2 a seq"):
        short.submit(list(range(20)), SamplingParams(max_new_tokens=14))
    with pytest.raises(ValueError, match="params is 5; use SamplingParams"):
        short.submit([1], 5)
    finish(short)
    assert fits.output == alone(fits.prompt, fits.params)


def test_sizes_are_checked_where_they_are_given():
    model = load_model(MODEL, TENSORS.__getitem__, LoadOptions(cache_tokens=64, page_size=16))
    for sizes in ({"max_batch": 0}, {"max_batch": 2.0}, {"max_pages": 0}, {"max_pages": "4"}):
        with pytest.raises(ValueError, match=f"{next(iter(sizes))} is .*; use a whole number"):
            Runner(model, **({"max_batch": 2, "max_pages": 4} | sizes))
    more = {"chunk_size": (0, 1.5, True), "max_length": (0, -1, 2.5), "detokenize": (5, "text")}
    for name, values in more.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name.replace('_', ' ')} is {value!r}; use "):
                engine(**{name: value})
    for pages in ((0, 16), (2.5, 16), (4, None)):
        with pytest.raises(ValueError, match="use a whole number of at least 1"):
            PagePool(*pages)
    for shape in ((0, 1), (1, 0), (1.0, 1)):
        with pytest.raises(ValueError, match="use a whole number of at least 1"):
            BlockTables(*shape, "cpu")
    for options in ({"page_size": 64.0}, {"cache_tokens": "9"}, {"max_positions": 1.5}):
        with pytest.raises(ValueError, match="use a whole number of at least 1"):
            load_model(MODEL, TENSORS.__getitem__, LoadOptions(**options))
    with pytest.raises(ValueError, match="tensor parallel size is 0"):
        check_tensor_parallel(MODEL, 0)
    with pytest.raises(ValueError, match="tensor parallel rank is 4; use a whole number from 0 to"):
        TensorParallel.share(4, 4)


# -- exceptions inside a step ----------------------------------------------------------------------


def expected_of(requests) -> list[list[int]]:
    return [alone(request.prompt, request.params) for request in requests]


def test_a_detokenizer_that_fails_ends_its_own_request():
    def fragile(ids: list[int]) -> str:
        if len(ids) == 4 and ids == expected[2][:4]:
            raise KeyError("no such token")
        return text(ids)

    params = SamplingParams(max_new_tokens=9, stop=("\x00",))
    expected = [alone(p, SamplingParams(max_new_tokens=9)) for p in prompts(4)]
    running = engine(detokenize=fragile)
    requests = [running.submit(p, params) for p in prompts(4)]
    seen = {request.id for request in running.run() if request.finish_reason == "error"}
    assert seen == {2} and running.pool.free == running.pool.num_pages
    assert [r.finish_reason for r in requests] == ["length", "length", "error", "length"]
    assert (requests[2].error, requests[2].output) == ("KeyError: 'no such token'", expected[2][:4])
    for i in (0, 1, 3):
        assert (requests[i].output, requests[i].text) == (expected[i], text(expected[i]))


@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_a_step_that_fails_for_one_request_ends_that_one(where):
    running = engine()
    requests = [running.submit(p, SamplingParams(max_new_tokens=9)) for p in prompts(6)]
    bad = requests[1]
    step = getattr(running.runner, where)

    def fails(*given, **named):
        pages = [chunk.pages for chunk in given[0]] if where == "prefill" else given[2]
        if bad.pages in pages and (where == "prefill" or len(bad.output) == 3):
            raise RuntimeError("the kernel\nfailed")
        return step(*given, **named)

    setattr(running.runner, where, fails)
    finish(running)
    assert (bad.finish_reason, bad.error) == ("error", "RuntimeError: the kernel failed")
    assert len(bad.output) == (0 if where == "prefill" else 3)
    others = [request for request in requests if request is not bad]
    assert [request.output for request in others] == expected_of(others)


def test_a_request_whose_logits_are_nan_ends_and_the_others_do_not():
    untied = MODEL.replace(tie_embeddings=False)
    tensors = random_tensors(untied)

    def outputs(given: list[list[int]]) -> list[Request]:
        options = LoadOptions(cache_tokens=1024, page_size=16)
        model = load_model(untied, tensors.__getitem__, options)
        running = Engine(Runner(model, 4, 16), 24)
        params = SamplingParams(max_new_tokens=3, temperature=0.8, top_k=9)
        requests = [running.submit(prompt, params) for prompt in given]
        finish(running)
        return requests

    (expected,) = outputs([[1, 2, 3]])
    unused = next(token for token in range(4, 61) if token not in expected.output)
    tensors[next(name for name in tensors if name.startswith("embedding"))][unused] = math.nan
    good, bad = outputs([[1, 2, 3], [1, unused, 3]])
    assert bad.finish_reason == "error" and "NaN or infinite logits" in bad.error
    assert good.output == expected.output


def test_a_failing_rank_of_several_raises(monkeypatch):
    running = engine()
    request = running.submit([1, 2], SamplingParams(max_new_tokens=2))
    monkeypatch.setattr(running.runner.model, "parallel", TensorParallel.share(2))
    monkeypatch.setattr(running.runner, "prefill", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        running.step()
    assert request.finish_reason is None


def test_cancelling_takes_what_is_this_engines_alone():
    mine, other = engine(), engine()
    request, foreign = (e.submit([1, 2], SamplingParams(max_new_tokens=2)) for e in (mine, other))
    other.step()
    with pytest.raises(ValueError, match="request 0 was submitted to another engine"):
        mine.cancel(foreign)
    with pytest.raises(ValueError, match="None is not a request"):
        mine.cancel(None)
    mine.cancel(request)
    mine.cancel(request)
    assert request.finish_reason == "cancelled" and not mine.busy
    finish(other)
    assert foreign.finish_reason == "length"


def test_cancelling_thousands_of_waiting_requests_takes_no_time():
    running = engine()
    prompt = list(range(61)) * 3
    requests = [running.submit(prompt, SamplingParams(max_new_tokens=9)) for _ in range(3000)]
    start = time.process_time()
    for request in reversed(requests):
        running.cancel(request)
    assert time.process_time() - start < 5 and not running.busy


# -- any order of anything -------------------------------------------------------------------------

PROMPTS = [[1], [2, 3, 4], list(range(40)), [9] * 17]
PARAMS = [
    SamplingParams(max_new_tokens=5),
    SamplingParams(max_new_tokens=11, temperature=0.9, top_k=7, top_p=0.9, seed=3),
    SamplingParams(max_new_tokens=3, temperature=1e-37, logprobs=True),
]
EXPECTED: dict[tuple[int, int], list[int]] = {}
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just(10**400),
    st.lists(st.one_of(st.integers(-2, 70), st.floats(), st.text(max_size=2)), max_size=3),
)  # fmt: skip
FIELDS = st.dictionaries(st.sampled_from(list(vars(PARAMS[0]))), ANYTHING, max_size=3)
GARBAGE = st.tuples(st.just("garbage"), ANYTHING, FIELDS)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 3), st.integers(0, 2)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.none()),
        st.tuples(st.just("fail"), st.integers(0, 30), st.none()),
        st.tuples(st.just("step"), st.integers(1, 4), st.none()),
        GARBAGE,
    ),
    max_size=14,
)
CALM = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def expected(prompt: int, params: int) -> list[int]:
    key = (prompt, params)
    if key not in EXPECTED:
        EXPECTED[key] = alone(PROMPTS[prompt], PARAMS[params])
    return EXPECTED[key]


@settings(CALM, max_examples=400)
@given(FIELDS)
def test_sampling_parameters_are_refused_in_one_line_or_draw(values):
    try:
        params = SamplingParams(**values)
    except ValueError as error:
        assert "\n" not in str(error) and "; use " in str(error)
        return
    logits = torch.tensor([[0.0, 3.0, -2.0], [1.0, 1.0, 1.0]])
    tokens, _ = sample(logits, [params, PARAMS[1]], [1, 2])
    assert 0 <= tokens[0] < 3 and tokens[1] == sample(logits[1:], [PARAMS[1]], [2])[0][0]


@settings(CALM, max_examples=60)
@given(OPERATIONS)
def test_whatever_is_asked_pages_return_and_others_get_their_tokens(operations):
    running = engine(tokens=128, max_batch=3, detokenize=lambda ids: fragile(ids))
    failing: set[int] = set()
    requests, asked = [], []

    def fragile(ids: list[int]) -> str:
        for request in requests:
            if request.output is ids and request.id in failing:
                raise LookupError("no text")
        return text(ids)

    for what, first, second in operations:
        if what == "submit":
            requests.append(running.submit(PROMPTS[first], PARAMS[second]))
            asked.append((first, second))
        elif what == "cancel" and first < len(requests):
            running.cancel(requests[first])
        elif what == "fail" and first < len(requests):
            failing.add(requests[first].id)
        elif what == "step":
            for _ in range(first):
                running.step()
        elif what == "garbage":
            try:
                params = SamplingParams(**({"max_new_tokens": 2} | second))
                request = running.submit(first, params)
            except ValueError as error:
                assert "\n" not in str(error)
            else:
                requests.append(request)
                asked.append(None)
    finish(running)
    assert not running.waiting and not running.prefilling
    for request, key in zip(requests, asked, strict=True):
        assert request.finish_reason is not None and not request.pages
        if key is None:
            continue
        wanted = expected(*key)
        assert request.output == wanted[: len(request.output)]
        if request.finish_reason == "length":
            assert request.output == wanted and request.id not in failing


def test_a_seed_whose_prompts_have_none_left_is_named_by_its_flag(tmp_path, capsys):
    argv = [str(tmp_path), "--prompt", "a", "--prompt", "b", "--seed", str(2**64 - 1)]
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    fix = f"leaves none for the last of 2 prompts; use at most {2**64 - 2}\n"
    assert said.endswith(f"--seed {2**64 - 1} {fix}")
