"""Inference on a GPU: kernels against the reference, captured steps against eager ones, the engine.

Run with `pytest -m gpu tests/gpu/test_inference_gpu.py`; needs torch and Triton only.
"""

import random

import pytest
import torch

from megatron_mlra.benchmarks.decoding.kernels import STEPS, profile_step
from megatron_mlra.benchmarks.decoding.measure import Case, gate, measure, random_reader
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.inference.chunks import Chunk
from megatron_mlra.inference.engine import Engine
from megatron_mlra.inference.load import LoadOptions, load_draft, load_model
from megatron_mlra.inference.runner import Runner
from megatron_mlra.inference.sampling import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = {
    "num_layers": 2,
    "hidden_size": 256,
    "ffn_hidden_size": 500,
    "num_attention_heads": 8,
    "vocab_size": 1000,
    "dtype": "bfloat16",
}
LATENT = {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}


def latent(latents, branches, dim, **changes):
    heads = {"num_latent_heads": latents, "num_branches": branches, "kv_lora_rank": latents * dim}
    return ModelDescription(**{**SIZES, **LATENT, "q_lora_rank": 128, **heads, **changes})


MODELS = {
    "MLRA-4": latent(4, 4, 64),
    "MLRA-2": latent(4, 2, 64),
    "MLRA-4 gated": latent(4, 4, 128, output_gate=True, tie_embeddings=False, query_head_norm=True),
    "GLA-2": latent(2, 1, 128, q_lora_rank=None),
    "MLA": latent(1, 1, 256),
    "MLRA-4 experts": latent(
        4,
        4,
        64,
        num_experts=16,
        moe_router_topk=4,
        moe_ffn_hidden_size=200,
        moe_shared_expert_intermediate_size=300,
        moe_layer_pattern=(0, 1),
        moe_router_pre_softmax=True,
    ),
    "GQA": ModelDescription(**SIZES, attention="gqa", num_query_groups=2, head_dim=64),
}


@pytest.mark.parametrize("name", MODELS)
def test_kernels_equal_the_reference_and_graphs_eager_steps(name):
    # One layer's logits would be of order 1; two random ones of 0.02 are small but not zero.
    assert 0 < gate(Case(name, MODELS[name]), seed=3) < 0.03


@pytest.mark.parametrize("name", ["MLRA-4", "MLRA-4 gated", "MLRA-4 experts", "GQA"])
def test_early_launches_change_no_bit(name):
    """Captured steps of one sequence, with every kernel started early and with each after the one
    in front; and products by torch, within rounding."""
    results = []
    for products in ("auto", "serial", "cublas"):
        runner = _runner(MODELS[name], "cuda", True, dtype="bfloat16", products=products)
        runner.prefill([Chunk(list(range(90)), 0, [9, 1, 3])])
        runner.tables.set(0, [9, 1, 3])
        steps = [runner.decode([i], [90 + i], [[9, 1, 3]]).clone() for i in range(20)]
        results.append(torch.cat(steps))
    assert torch.equal(results[0], results[1])
    # Both round each operation to bfloat16 after sums in other orders: the bar of its logits, 3e-2.
    torch.testing.assert_close(results[0], results[2], atol=3e-2, rtol=3e-2)


def test_a_step_is_profiled_by_what_its_kernels_do():
    """One sequence on the kernels of few rows, and a batch on cuBLAS."""
    found = measure(Case("MLRA-4", MODELS["MLRA-4"]), [300], [1, 6], 1e12, seed=7, profile=True)
    for record in found:
        told = record["profile"]
        assert told["steps"] == STEPS and told["launches"] == int(told["launches"]) > 15
        assert told["busy_us"] + told["idle_us"] == pytest.approx(told["step_us"])
        assert sum(kernel["us"] for kernel in told["kernels"]) == pytest.approx(told["busy_us"])
        assert 0.2 * record["us"] < told["step_us"] < 5 * record["us"]
        launches = {kernel["what"]: kernel["launches"] for kernel in told["kernels"]}
        assert launches["attention"] == launches["cache append"] == SIZES["num_layers"]
        fused = launches.get("product 256 to 1024 + SwiGLU")
        assert fused == (SIZES["num_layers"] if record["batch"] == 1 else None)


def test_nothing_to_profile_is_said():
    assert "error" in profile_step(lambda: None)


@pytest.mark.parametrize("name", ["MLRA-4", "GLA-2", "MLA", "GQA"])
def test_a_share_of_the_tokens(name):
    # One of two ranks, without the other: what it exchanges with itself is the reference's too.
    assert 0 < gate(Case(name, MODELS[name], context=2), seed=6) < 0.03


@pytest.mark.parametrize("name", ["MLRA-4", "MLA"])
def test_fp8_cache(name):
    assert gate(Case(name, MODELS[name], cache_dtype="fp8"), seed=4) < 0.1


def _runner(model, device, graphs, **options):
    settings = LoadOptions(cache_tokens=4096, max_positions=1024, **options)
    loaded = load_model(model, random_reader(model, "cpu", seed=5), settings, device)
    return Runner(loaded, max_batch=6, max_pages=16, graphs=graphs)


def test_a_batch_between_two_captured_sizes():
    eager, captured = (
        _runner(MODELS["MLRA-4"], "cuda", graphs, dtype="bfloat16") for graphs in (False, True)
    )
    results = []
    for runner in (eager, captured):
        pages = [[9, 1], [0, 4], [7, 3]]
        runner.prefill(
            [Chunk(list(range(n)), 0, own) for n, own in zip((5, 64, 90), pages, strict=True)]
        )
        for row, own in enumerate(pages):
            runner.tables.set(row, own)
        results.append(runner.decode([1, 2, 3], [5, 64, 90], pages).clone())
    torch.testing.assert_close(results[1], results[0], atol=2e-2, rtol=2e-2)


def _speculating(model, graphs):
    """An engine that guesses, in bfloat16 on the kernels."""
    model = model.replace(mtp_num_layers=1)
    read = random_reader(model, "cpu", seed=5)
    options = LoadOptions(dtype="bfloat16", cache_tokens=4096, max_positions=1024, draft=True)
    loaded = load_model(model, read, options, "cuda")
    runner = Runner(loaded, max_batch=4, max_pages=16, graphs=graphs)
    return Engine(runner, chunk_size=96, draft=load_draft(loaded, read))


@pytest.mark.parametrize("name", MODELS)
def test_verified_steps_as_graphs_are_eager_ones(name):
    """Of sequences with two tokens, one and none; of the decoder and of the layer that guesses."""
    results = []
    pages, lengths = [[9, 1], [0, 4], [7, 3], [12]], (5, 63, 90, 1)
    more = [[8, 9], [1], [10, 11], []]
    for graphs in (False, True):
        engine, found = _speculating(MODELS[name], graphs), []
        new = None
        for runner in (engine.runner, engine.speculation.runner):
            prompts = [Chunk(list(range(n)), 0, own) for n, own in zip(lengths, pages, strict=True)]
            behind = None if new is None else new.new_zeros(sum(lengths), new.size(1))
            runner.states(prompts, behind)
            for row, own in enumerate(pages):
                runner.tables.set(row, own)
            # A whole bucket, for the same products; then a part of one, whose rows it leaves empty.
            for count in (4, 3):
                steps = zip(more[:count], lengths, pages, strict=False)
                chunks = [Chunk(tokens, n, own) for tokens, n, own in steps]
                states, logits = (x.clone() for x in runner.verify(chunks, new))
                assert states.isfinite().all() and logits.isfinite().all()
                found.append((states, logits))
            new = states
        results.append(found)
    for at, (eager, captured) in enumerate(zip(*results, strict=True)):
        for one, other in zip(eager, captured, strict=True):
            if at % 2 == 0:
                assert torch.equal(one, other)
            else:
                torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["MLRA-4", "MLA", "GQA"])
def test_guesses_change_no_token(name):
    """One sequence at a time, whose steps have the same shape with graphs and without."""
    outputs = []
    for graphs in (False, True):
        engine = _speculating(MODELS[name], graphs)
        for prompt in ([1], [2] * 63, list(range(200))):
            request = engine.submit(prompt, SamplingParams(max_new_tokens=12))
            for _ in engine.run():
                pass
            outputs.append((prompt, request.output))
        outputs.append(engine.speculation.guessed)
        assert engine.pool.free == engine.pool.num_pages
    half = len(outputs) // 2
    assert outputs[:half] == outputs[half:]


@pytest.mark.parametrize("name", ["MLRA-4", "MLA", "GQA"])
def test_the_engine_chooses_what_it_chooses_on_a_cpu(name):
    rng = random.Random(1)
    prompts = [[rng.randrange(1000) for _ in range(n)] for n in (1, 7, 64, 65, 200, 3, 130, 31)]
    outputs = []
    runners = [
        _runner(MODELS[name], "cpu", False, dtype="float32"),
        _runner(MODELS[name], "cuda", True, dtype="bfloat16", backend="mlra_kernels"),
    ]
    for runner in runners:
        engine = Engine(runner, chunk_size=96)
        requests = [engine.submit(p, SamplingParams(max_new_tokens=12)) for p in prompts]
        for _ in engine.run():
            pass
        assert engine.pool.free == engine.pool.num_pages
        outputs.append([request.output for request in requests])
    cpu = runners[0]
    for prompt, expected, found in zip(prompts, *outputs, strict=True):
        same = next(
            (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None
        )
        if same is None:
            continue
        # Where they part, the two tokens must have been as good as equal.
        prefix = prompt + expected[:same]
        logits = cpu.prefill([Chunk(prefix, 0, list(range(16)))])[0]
        margin = float(logits[expected[same]] - logits[found[same]])
        assert margin < 0.02 * float(logits.std()), f"token {same} differs by {margin}"
