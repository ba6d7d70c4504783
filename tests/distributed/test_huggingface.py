"""Exported Hugging Face models against Megatron: logits, gradients, and the way back."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.checkpoint.huggingface.folder import write_huggingface
from megatron_mlra.checkpoint.huggingface.names import HF_EXPERT_BIAS, rules
from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.description.tensors import EXPERT_BIAS
from support.hf_cases import CASES


@pytest.fixture(scope="session")
def megatron(run_driver):
    """Folder of Megatron checkpoints, with each one's logits and gradients beside it."""
    return run_driver("hf", 900)


@pytest.fixture(scope="session", params=CASES)
def case(request, megatron, tmp_path_factory):
    """(description, Megatron folder, exported folder, Megatron's results) of one model."""
    name = request.param
    exported = tmp_path_factory.mktemp("hf") / name
    source = open_checkpoint(megatron / name)
    assert source.description == CASES[name]
    write_huggingface(source, exported, tokenizer="byte", progress=False)
    return CASES[name], source, exported, torch.load(megatron / f"{name}.pt")


def load(folder, **options):
    """The exported model, as a user loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def test_logits_and_gradients_equal_megatrons(case):
    description, _, exported, expected = case
    model = load(exported)
    logits = model(expected["tokens"]).logits
    assert expected["logits"].std() > 0.3
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)
    (logits * expected["direction"]).mean().backward()
    found = {name: param.grad for name, param in model.named_parameters()}
    table = rules(description)
    biases = {name for name in table if name.endswith(EXPERT_BIAS)}
    assert bool(biases) == description.moe_router_enable_expert_bias
    assert set(table) - biases == set(expected["gradients"])
    for name, gradient in expected["gradients"].items():
        joined = table[name].join([found[their] for their in table[name].theirs])
        scale = gradient.abs().max()
        assert scale > 0
        assert (joined - gradient).abs().max() <= 1e-4 * scale, name


def test_round_trip_is_bitwise(case, tmp_path):
    description, source, exported, _ = case
    write_megatron(open_checkpoint(exported), tmp_path / "back", progress=False)
    back = open_checkpoint(tmp_path / "back")
    assert back.description == description
    assert back.names() == source.names()
    for name in source.names():
        assert torch.equal(back.tensor(name), source.tensor(name)), name


def test_sharded_export_in_bfloat16(case, tmp_path):
    description, source, _, expected = case
    write_huggingface(
        source, tmp_path / "hf", dtype="bfloat16", max_shard_bytes=50_000, progress=False
    )
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    model = load(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16
    biases = {n: b for n, b in model.state_dict().items() if n.endswith(HF_EXPERT_BIAS)}
    for name, rule in rules(description).items():
        if rule.theirs[0] in biases:
            assert torch.equal(biases.pop(rule.theirs[0]), source.tensor(name))
    assert not biases
    assert model.config.vocab_size == description.vocab_size
    error = (model(expected["tokens"]).logits.float() - expected["logits"]).abs().mean()
    assert error < 0.05 * expected["logits"].std()
