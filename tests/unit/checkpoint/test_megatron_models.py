"""Megatron's own models, saved at TP2, are the same function in every converted form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.checkpoint.verify.forward import hidden_states
from megatron_mlra.checkpoint.verify.forward import logits as streamed_logits
from megatron_mlra.description.tensors import EXPERT_BIAS
from megatron_mlra.evaluation.models import load_model
from support.drivers.megatron import MODELS, MOE_LAYOUTS, MOE_MODELS
from support.research_model import VARIANTS, logits
from support.tensors import assert_same_tensors, weights_of

BATCH, SEQ, VOCAB = 2, 32, 128


@pytest.fixture(scope="module")
def saved(run_driver) -> Path:
    """Folders and logits of the driver."""
    return run_driver("megatron", 900)


def batch() -> torch.Tensor:
    """The tokens that the driver's logits are of."""
    generator = torch.Generator().manual_seed(100)
    return torch.randint(VOCAB, (BATCH, SEQ + 1), generator=generator)[:, :-1]


@pytest.mark.parametrize("variant", MODELS)
def test_same_function_and_bits(variant, saved, convert, tmp_path):
    source = saved / variant
    expected = torch.load(saved / f"{variant}.logits.pt")
    assert expected.abs().max() > 1
    opened = open_checkpoint(source)
    assert (opened.description.variant, opened.iteration) == (variant, 7)
    with torch.no_grad():
        *_, state = hidden_states(opened, batch())
        found = streamed_logits(opened, state).transpose(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    official, back = tmp_path / "official", tmp_path / "back"
    assert convert("export-official", source, official)[0] == 0
    weights, sizes = weights_of(official), replace(VARIANTS[variant], tied=True)
    for sequence, wanted in zip(batch(), expected.double(), strict=True):
        found = logits(sizes, weights, sequence)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert convert("import-official", official, back)[0] == 0
    assert_same_tensors(source, back)
    code, said = convert("verify", source, official)
    assert code == 0 and "logits differ by at most 0, " in said


@pytest.mark.parametrize("variant", MODELS)
def test_huggingface_and_back(variant, saved, convert, tmp_path):
    source, exported, back = saved / variant, tmp_path / "exported", tmp_path / "back"
    if variant == "GQA gated":
        code, error = convert("export-hf", source, exported)
        assert code == 2 and "gate" in error and not exported.exists()
        return
    assert convert("export-hf", source, exported)[0] == 0
    assert convert("import-hf", exported, back)[0] == 0
    assert_same_tensors(source, exported)
    assert_same_tensors(source, back)
    if variant == "MLRA-4 gated":
        code, said = convert("verify", source, exported, "--transformers")
        assert code == 0 and "within the tolerance 0.0001" in said
        code, error = convert("verify", source, back, "--transformers")
        assert code == 2 and "is a megatron folder; transformers runs exported folders" in error


@pytest.mark.parametrize("layout", MOE_LAYOUTS)
@pytest.mark.parametrize("variant", MOE_MODELS)
def test_mixture_of_experts(variant, layout, saved, convert, tmp_path):
    source = saved / f"{variant} {layout}"
    expected = torch.load(saved / f"{variant} {layout}.logits.pt")
    assert expected.abs().max() > 1
    opened = open_checkpoint(source)
    assert opened.description.variant == variant
    with torch.no_grad():
        *_, state = hidden_states(opened, batch())
        found = streamed_logits(opened, state).transpose(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    back = tmp_path / "back"
    write_megatron(opened, back, progress=False)
    assert_same_tensors(source, back)
    description = opened.description.replace(tokenizer_type="NullTokenizer")
    assert open_checkpoint(back).description == description
    write_megatron(opened, tmp_path / "half", dtype="bfloat16", progress=False)
    argv = ("reshard", source, tmp_path / "weights", "--weights-only", "--dtype", "bfloat16")
    assert convert(*argv)[0] == 0
    assert_same_tensors(tmp_path / "half", tmp_path / "weights")
    half = open_checkpoint(tmp_path / "half")
    assert half.description.dtype == "bfloat16"
    for name, tensor in opened.tensors():
        wide = name.endswith(EXPERT_BIAS)
        assert torch.equal(half.tensor(name), tensor if wide else tensor.bfloat16()), name
    code, said = convert("inspect", source)
    assert code == 0 and " 6 experts of 24" in said
    code, error = convert("export-official", source, tmp_path / "official")
    assert code == 2 and "the research code has no mixture of experts" in error

    exported = tmp_path / "exported"
    code, error = convert("export-hf", source, exported)
    if variant == "GQA MoE":
        assert code == 2 and "Llama has no experts" in error and not exported.exists()
        return
    assert code == 0
    code, said = convert("verify", source, exported, "--transformers")
    assert code == 0 and "within the tolerance 0.0001" in said
    assert convert("import-hf", exported, tmp_path / "imported")[0] == 0
    assert_same_tensors(source, tmp_path / "imported")
    with torch.no_grad():
        evaluated = load_model(opened)(batch()).logits
    torch.testing.assert_close(evaluated, expected, rtol=0, atol=1e-4)
