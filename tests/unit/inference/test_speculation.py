"""Guesses of multi-token prediction change no token, whatever else runs; right ones save steps."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.tensors import expected_tensors
from megatron_mlra.inference.chunks import Chunk
from megatron_mlra.inference.cli import main
from megatron_mlra.inference.engine import Engine
from megatron_mlra.inference.load import LoadOptions, load_draft, load_model
from megatron_mlra.inference.runner import Runner
from megatron_mlra.inference.sampling import SamplingParams

SIZES = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 13,
    "max_position_embeddings": 128,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
MODELS = {
    "MLA": ModelDescription(**SIZES, **LATENT, num_latent_heads=1, num_branches=1),
    "MLRA-4": ModelDescription(**SIZES, **LATENT, num_latent_heads=4, num_branches=4),
    "GQA": ModelDescription(**SIZES, attention="gqa", num_query_groups=2, head_dim=8),
    "MLRA-4 gated NoPE, experts": ModelDescription(
        **SIZES, **LATENT | {"qk_rope_head_dim": 0}, num_latent_heads=4, num_branches=4,
        output_gate=True, num_experts=4, moe_ffn_hidden_size=16, moe_router_topk=2,
        moe_layer_pattern=(0, 1),
    ),
}  # fmt: skip


def tensors(model: ModelDescription) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = expected_tensors(model.replace(mtp_num_layers=1))
    return {
        name: torch.randn(shape, generator=generator)
        * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def engine(model: ModelDescription, speculate: bool, chunk_size: int = 24) -> Engine:
    own = tensors(model)
    options = LoadOptions(cache_tokens=512, page_size=16, draft=speculate)
    loaded = load_model(model, own.__getitem__, options)
    loaded.cache.data.fill_(float("nan"))
    draft = load_draft(loaded, own.__getitem__) if speculate else None
    return Engine(Runner(loaded, 3, max_pages=8), chunk_size, draft=draft)


def outputs(running: Engine, temperature: float) -> list[list[int]]:
    rng = random.Random(5)
    requests = [
        running.submit(
            [rng.randrange(13) for _ in range(rng.randint(1, 60))],
            SamplingParams(rng.randint(1, 40), temperature=temperature, seed=i, stop_ids=(3, 5)),
        )
        for i in range(7)
    ]
    for _ in running.run():
        pass
    assert running.pool.free == running.pool.num_pages
    assert {request.finish_reason for request in requests} <= {"stop", "length"}
    return [request.output for request in requests]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_guesses_change_no_token(name, temperature):
    model = MODELS[name]
    guessing = engine(model, speculate=True)
    assert outputs(guessing, temperature) == outputs(engine(model, speculate=False), temperature)
    speculation = guessing.speculation
    assert speculation.guessed > 20 and 0 < speculation.right < speculation.guessed
    assert not speculation.guesses


@pytest.mark.parametrize("name", MODELS)
def test_a_verified_step_is_a_prompts(name):
    """Sequences with two tokens, one and none in one step of fixed size, of decoder and layer."""
    running = engine(MODELS[name], speculate=True)
    prompts, more = [[1, 2, 3, 4], [5], list(range(12)) + [7] * 21], [[8, 9], [], [10]]
    pages = [[4, 1], [7], [2, 9, 0]]
    chunks = [
        Chunk(tokens, len(prompt), own)
        for prompt, tokens, own in zip(prompts, more, pages, strict=True)
    ]
    states = None
    for runner in (running.runner, running.speculation.runner):
        first = [Chunk(prompt, 0, own) for prompt, own in zip(prompts, pages, strict=True)]
        behind = None if states is None else states[: sum(map(len, prompts))]
        before = runner.states(first, behind)
        for row, own in enumerate(pages):
            runner.tables.set(row, own)
        new = None if states is None else states[len(behind) :]
        found, logits = runner.verify(chunks, new)
        expected = runner.states([chunk for chunk in chunks if chunk.tokens], new)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(logits, runner.model.logits(expected), rtol=0, atol=2e-5)
        assert len(found) == 3
        states = torch.cat((before, found))


def test_right_guesses_halve_the_steps():
    """Of an output that repeats one token, every guess can be right."""
    model = MODELS["MLRA-4"]
    guessing = engine(model, speculate=True)
    for weights in (guessing.runner.model.weights, guessing.speculation.runner.model.weights):
        weights.final_norm.zero_()  # equal logits: the first token is the likeliest
    request = guessing.submit([1, 2, 3], SamplingParams(21))
    steps = sum(1 for _ in guessing.run())
    assert request.output == [0] * 21
    assert steps == 11
    assert guessing.speculation.right == guessing.speculation.guessed == 10


def test_a_failing_request_ends_alone():
    guessing = engine(MODELS["MLRA-4"], speculate=True)
    good = guessing.submit([1, 2, 3], SamplingParams(12))
    bad = guessing.submit([4, 5], SamplingParams(12))
    draw = guessing._draw

    def draw_or_fail(requests, logits, ahead=None):
        logits = logits.clone()
        for row, request in enumerate(requests):
            if request is bad and len(request.output) >= 4:
                logits[row] = float("nan")
        return draw(requests, logits, ahead)

    guessing._draw = draw_or_fail
    for _ in guessing.run():
        pass
    assert bad.finish_reason == "error" and len(bad.output) >= 4
    alone = engine(MODELS["MLRA-4"], speculate=False)
    other = alone.submit([1, 2, 3], SamplingParams(12))
    for _ in alone.run():
        pass
    assert good.output == other.output


def test_prompts_of_one_token_that_fail_say_why():
    guessing = engine(MODELS["MLRA-4"], speculate=True)
    draw = guessing._draw
    guessing._draw = lambda requests, logits, ahead=None: draw(
        requests, torch.full_like(logits, float("nan")), ahead
    )
    requests = [guessing.submit([token], SamplingParams(3)) for token in (1, 2)]
    for _ in guessing.run():
        pass
    assert [r.error for r in requests] == [
        "ArithmeticError: the model gave NaN or infinite logits"
    ] * 2


def test_behind_is_what_a_layer_that_guesses_needs():
    layer = engine(MODELS["MLRA-4"], speculate=True).speculation.runner
    layer.tables.set(0, [0])
    d = layer.model.model.hidden_size
    for behind, shown in ((None, "None"), (torch.zeros(1, d), rf"\[1, {d}\]"), (5, "5")):
        for step in (layer.states, layer.verify):
            with pytest.raises(ValueError, match=rf"behind is {shown}; .* takes .* \[2, {d}\]"):
                step([Chunk([1, 2], 0, [0])], behind)


def test_tokens_cut_over_ranks_are_refused(tmp_path, capsys):
    # From the command line before the folder is looked at.
    argv = [str(tmp_path), "--prompt", "x", "--speculate", "--context-parallel", "2"]
    assert main(argv) == 2
    assert "--context-parallel 2 cuts them; leave one of them out" in capsys.readouterr().err
    guessing = engine(MODELS["MLRA-4"], speculate=True)
    model = guessing.speculation.runner.model
    model.parallel = type(model.parallel)(context=2)
    with pytest.raises(ValueError, match="context parallel size is 2; use 1, or decode without"):
        Engine(guessing.runner, draft=model)
    main_model = guessing.runner.model
    main_model.parallel = type(main_model.parallel).share(1, context=2)
    runner = Runner(main_model, 1, 4)
    with pytest.raises(ValueError, match="of 2 tokens a sequence need whole sequences, and con"):
        runner.verify([Chunk([1, 2], 3, [0, 1])])
