"""Continuous batching, sampling and the page pool, on a model small enough to run in milliseconds.

That its logits are right is tests/distributed/test_inference.py's; here requests must get what they
would get alone, whatever else runs.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest
import torch

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.tensors import expected_tensors
from megatron_mlra.inference.backends.select import select_backend
from megatron_mlra.inference.cache import CacheFull, PagePool
from megatron_mlra.inference.chunks import Chunk
from megatron_mlra.inference.engine import Engine
from megatron_mlra.inference.load import LoadOptions, load_draft, load_model
from megatron_mlra.inference.runner import Runner, batch_buckets
from megatron_mlra.inference.sampling import SamplingParams, sample, uniform

MODEL = ModelDescription(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    vocab_size=61,
    num_latent_heads=4,
    num_branches=4,
    q_lora_rank=16,
    kv_lora_rank=32,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    max_position_embeddings=256,
)


def random_tensors(model: ModelDescription) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator)
        * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        + (len(shape) == 1)
        for name, shape in expected_tensors(model).items()
    }


TENSORS = random_tensors(MODEL)


def engine(tokens: int = 1024, max_batch: int = 4, chunk_size: int = 24, **more) -> Engine:
    options = LoadOptions(cache_tokens=tokens, page_size=16)
    model = load_model(MODEL, TENSORS.__getitem__, options)
    model.cache.data.fill_(float("nan"))
    return Engine(Runner(model, max_batch, max_pages=16), chunk_size, **more)


def prompts(count: int, longest: int = 70) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(61) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def alone(prompt: list[int], params: SamplingParams, **more) -> list[int]:
    one = engine(**more)
    request = one.submit(prompt, params)
    finish(one)
    return request.output


def finish(running: Engine) -> None:
    for _ in running.run():
        pass
    assert running.pool.free == running.pool.num_pages
    assert not running.running


def text(ids: list[int]) -> str:
    return "".join(chr(65 + i) for i in ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_requests_get_what_they_get_alone(temperature):
    settings = [
        SamplingParams(max_new_tokens=3 + 4 * i, temperature=temperature, top_k=20, seed=i)
        for i in range(7)
    ]
    busy = engine()
    requests = [busy.submit(p, s) for p, s in zip(prompts(7), settings, strict=True)]
    most = 0
    while busy.busy:
        busy.step()
        most = max(most, len(busy.running))
    assert most == 4
    for request, prompt, params in zip(requests, prompts(7), settings, strict=True):
        assert request.output == alone(prompt, params)
        assert (request.finish_reason, len(request.output)) == ("length", params.max_new_tokens)
        assert request.submitted <= request.first_token <= request.last_token


def test_requests_join_between_steps():
    late = engine()
    first = late.submit([1, 2, 3], SamplingParams(max_new_tokens=30))
    for _ in range(9):
        late.step()
    second = late.submit(list(range(50)), SamplingParams(max_new_tokens=5))
    finish(late)
    assert first.output == alone([1, 2, 3], SamplingParams(max_new_tokens=30))
    assert second.output == alone(list(range(50)), SamplingParams(max_new_tokens=5))


def test_decoding_goes_on_between_chunks_of_a_long_prompt():
    running = engine(chunk_size=16)
    first = running.submit([4], SamplingParams(max_new_tokens=50))
    running.step()
    running.submit([i % 61 for i in range(160)], SamplingParams(max_new_tokens=2))
    before = len(first.output)
    for _ in range(9):
        running.step()
    assert len(running.running) == 1 and len(first.output) == before + 9


def test_a_full_cache_lets_requests_wait_in_order():
    # Four pages of 16: the first takes three, the second needs two, the third would fit at once.
    small = engine(tokens=64)
    first = small.submit(list(range(40)), SamplingParams(max_new_tokens=8))
    second = small.submit(list(range(20)), SamplingParams(max_new_tokens=4))
    third = small.submit([1], SamplingParams(max_new_tokens=2))
    small.step()
    held = list(first.pages)
    assert [small.pool.free, len(small.waiting)] == [1, 2]
    for _ in range(3):
        small.step()
    assert first.pages == held and not second.output and not third.output
    finish(small)
    for request in (first, second, third):
        assert request.output == alone(request.prompt, request.params)


def test_what_can_never_fit_is_refused_with_the_numbers():
    small = engine(tokens=64)
    running = small.submit([1, 2], SamplingParams(max_new_tokens=6))
    small.step()
    with pytest.raises(CacheFull, match=r"69 tokens need 5 pages of 16, the cache has 4"):
        small.submit(list(range(60)), SamplingParams(max_new_tokens=10))
    with pytest.raises(ValueError, match=r"60 tokens and 200 new ones exceed the context of 256;"):
        small.submit(list(range(60)), SamplingParams(max_new_tokens=200))
    finish(small)
    assert running.output == alone([1, 2], running.params)


def test_cancelling_frees_its_pages_and_nothing_else():
    running = engine()
    requests = [running.submit(p, SamplingParams(max_new_tokens=20)) for p in prompts(6)]
    for _ in range(6):
        running.step()
    running.cancel(requests[0])
    running.cancel(requests[5])
    finish(running)
    assert [r.finish_reason for r in requests] == ["cancelled", *["length"] * 4, "cancelled"]
    for request in requests[1:5]:
        assert request.output == alone(request.prompt, request.params)


def test_stop_ids_and_stop_texts():
    long = SamplingParams(max_new_tokens=20)
    expected = alone([7, 8], long)
    assert (
        alone([7, 8], SamplingParams(max_new_tokens=20, stop_ids=(expected[4],)))[-1]
        == (expected[4])
    )
    stop = text(expected[3:5])
    stopping = engine(detokenize=text)
    request = stopping.submit([7, 8], SamplingParams(max_new_tokens=20, stop=(stop,)))
    other = stopping.submit([7, 8], long)
    finish(stopping)
    assert (request.finish_reason, request.text) == ("stop", text(expected).partition(stop)[0])
    assert (other.text, other.finish_reason) == (text(expected), "length")
    with pytest.raises(ValueError, match="stop texts need a tokenizer"):
        engine().submit([7], SamplingParams(stop=("x",)))


def test_log_probabilities_are_the_models():
    running = engine()
    request = running.submit(
        [5, 6, 7], SamplingParams(max_new_tokens=6, logprobs=True, top_k=3, temperature=0.7)
    )
    finish(running)
    replay = engine()
    tokens = [5, 6, 7, *request.output]
    from megatron_mlra.inference.chunks import Chunk

    logits = replay.runner.prefill([Chunk(tokens, 0, [0])], every_row=True).log_softmax(-1)
    expected = [float(logits[2 + i, token]) for i, token in enumerate(request.output)]
    assert request.logprobs == pytest.approx(expected, abs=1e-4)


# -- sampling --------------------------------------------------------------------------------------


def draws(logits: list[float], count: int = 2000, **params) -> list[float]:
    """Frequencies of each token."""
    settings = [SamplingParams(temperature=1.0, **params)] * count
    tokens, _ = sample(torch.tensor([logits]).expand(count, -1), settings, list(range(count)))
    return [tokens.count(i) / count for i in range(len(logits))]


def test_frequencies_follow_the_distribution():
    logits = [0.0, 1.0, -1.0, 2.0]
    expected = torch.tensor(logits).softmax(-1).tolist()
    assert draws(logits) == pytest.approx(expected, abs=0.04)


def test_top_k_and_top_p_cut_the_tail():
    logits = [math.log(p) for p in (0.1, 0.5, 0.3, 0.1)]
    assert draws(logits, top_k=2) == pytest.approx([0, 0.625, 0.375, 0], abs=0.04)
    assert draws(logits, top_p=0.75) == pytest.approx([0, 0.625, 0.375, 0], abs=0.04)
    assert draws(logits, top_p=0.81)[0] > 0
    assert draws(logits, top_k=1, top_p=0.01) == [0, 1, 0, 0]


def test_low_temperature_approaches_greedy_and_rows_are_independent():
    logits = torch.tensor([[0.0, 0.1, 0.05]] * 3)
    params = [
        SamplingParams(temperature=1e-4),
        SamplingParams(),
        SamplingParams(temperature=5.0, seed=3),
    ]
    together, _ = sample(logits, params, [4, 4, 4])
    apart = [sample(logits[i : i + 1], params[i : i + 1], [4])[0][0] for i in range(3)]
    assert together == apart and together[:2] == [1, 1]


def test_draws_depend_on_seed_and_position():
    values = {uniform(seed, position) for seed in range(20) for position in range(20)}
    assert len(values) == 400 and all(0 <= v < 1 for v in values)
    assert uniform(3, 4) == uniform(3, 4)


# -- pages -----------------------------------------------------------------------------------------


def test_the_pool_gives_all_or_nothing():
    pool = PagePool(5, 16)
    mine = pool.take(33)
    assert (len(mine), pool.free) == (3, 2)
    with pytest.raises(CacheFull, match=r"40 tokens need 3 pages of 16, 2 of 5 are free"):
        pool.take(40)
    assert pool.free == 2
    other = pool.take(32)
    assert sorted(mine + other) == list(range(5))
    pool.give_back(mine)
    assert sorted(pool.take(48)) == sorted(mine)


@pytest.mark.parametrize(
    ("size", "expected"), [(1, [1]), (4, [1, 2, 4]), (20, [1, 2, 4, 8, 16, 20])]
)
def test_captured_batch_sizes(size, expected):
    assert batch_buckets(size) == expected


def test_mlra4_at_tp4_allocates_one_and_a_half_heads_a_token():
    from megatron_mlra.inference.cache import LatentCache
    from megatron_mlra.inference.parallel import HeadShard

    paper = MODEL.replace(
        hidden_size=3072, num_attention_heads=24, q_lora_rank=1024, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, softmax_scale=None,
    )  # fmt: skip
    for mode in ("replicated", "sharded"):
        for rank in range(4):
            shard = HeadShard.plan(paper, 4, rank, mode)
            cache = LatentCache(paper, shard, 3, 64, torch.bfloat16, "cpu")
            storage = cache.data.untyped_storage().nbytes()
            assert storage == cache.allocated_bytes == 3 * 64 * 2 * int(1.5 * 128) * 2
            assert cache.bytes_per_token == 2 * int(1.5 * 128) * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cuda"}, "backend is 'cuda'; use one of auto, mlra_kernels, torch"),
        ({"backend": "mlra_kernels"}, "backend mlra_kernels need a CUDA device, this is cpu"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"cache_dtype": "float16"}, "cache dtype float16 does not go with float32 weights"),
        ({"page_size": 20}, "page size is 20; use a multiple of 16"),
        ({"page_size": 2**21}, "page size is 2097152; use a multiple of 16, best 64, at most 1048"),
        ({"weight_mode": "split"}, "weight mode is 'split'"),
        ({"all_reduce": "ring"}, "all-reduce is 'ring'; use one of auto, one-shot, nccl"),
        ({"cache_tokens": 0}, "cache tokens is 0"),
    ],
)
def test_bad_options_are_refused_before_a_tensor_is_read(options, message):
    def read(name):
        raise AssertionError("read")

    with pytest.raises(ValueError, match=message):
        load_model(MODEL, read, LoadOptions(**options))


@pytest.mark.parametrize(
    ("groups", "page_size", "tp", "misfit"),
    [
        (2, 64, 1, None),
        (2, 192, 1, None),
        (2, 16, 1, "take pages of a multiple of 64 tokens for grouped queries, not 16"),
        (1, 64, 1, "take 128 query heads a key head, not 256"),
        (1, 64, 2, None),
    ],
)
def test_grouped_queries_run_on_kernels_that_take_them(groups, page_size, tp, misfit):
    """What the kernels refuse is known before any weight is read, not at each request's step."""
    model = ModelDescription(
        num_layers=1, hidden_size=64, ffn_hidden_size=64, num_attention_heads=256, vocab_size=61,
        attention="gqa", num_query_groups=groups, head_dim=64,
    )  # fmt: skip
    place = (model, torch.bfloat16, torch.device("cuda"), "auto", page_size, tp)
    assert select_backend("auto", *place).name == ("torch" if misfit else "mlra_kernels")
    if misfit:
        with pytest.raises(ValueError, match=f"mlra_kernels {misfit}; use backend torch"):
            select_backend("mlra_kernels", *place)


@pytest.mark.parametrize("attention", ["mlra", "gqa"])
@pytest.mark.parametrize("pattern", [(), (1,)])
def test_a_layer_without_rope_does_not_see_the_order_of_tokens(attention, pattern):
    sizes = {"num_layers": 1, "softmax_scale": None, "no_rope_pattern": pattern}
    if attention == "gqa":
        sizes |= {"attention": "gqa", "num_query_groups": 2, "head_dim": 16}
    model = MODEL.replace(**sizes)
    gen = torch.Generator().manual_seed(3)
    tensors = {n: torch.randn(s, generator=gen) for n, s in expected_tensors(model).items()}
    found = []
    for tokens in ([1, 2, 3, 4, 5, 6], [5, 3, 1, 2, 4, 6]):
        loaded = load_model(model, tensors.__getitem__, LoadOptions(cache_tokens=64))
        runner = Runner(loaded, 1, 1)
        runner.tables.set(0, [0])
        runner.prefill([Chunk(tokens[:-1], 0, [0])])
        found.append(runner.decode(tokens[-1:], [5], [[0]]))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4) == bool(pattern)
    if pattern:
        with pytest.raises(ValueError, match="says nothing of the layer that guesses"):
            load_draft(loaded, tensors.__getitem__)


def test_tensor_parallel_sizes_that_do_not_fit_name_those_that_do():
    from megatron_mlra.inference.parallel import check_tensor_parallel

    with pytest.raises(ValueError, match=r"size 3 does not fit MLRA-4 \(4 heads.* 1, 2, 4$"):
        check_tensor_parallel(MODEL, 3)


def test_inference_runs_without_megatron():
    """Where only torch and Triton are installed, as on a serving machine."""
    code = (
        "import sys, megatron_mlra.inference.cli, megatron_mlra.benchmarks.decoding.measure\n"
        "sys.exit([n for n in sys.modules if n.partition('.')[0] == 'megatron'] or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
