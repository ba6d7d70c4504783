"""Mixtures of experts in the decoder: every way of running experts, tensor parallel parts, a model.

That routing is Megatron's is tests/distributed/test_inference.py's.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn.functional import silu

from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.checkpoint.verify.forward import hidden_states, logits
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.tensors import layer_tensors
from megatron_mlra.inference import mlp
from megatron_mlra.inference.backends.reference import ReferenceOps
from megatron_mlra.inference.cli import main
from megatron_mlra.inference.mlp import load_mlp, run_mlp
from support.random_checkpoint import RandomFolder, latent

MODEL = latent(
    4,
    4,
    num_experts=7,
    moe_router_topk=2,
    moe_ffn_hidden_size=20,
    moe_shared_expert_intermediate_size=36,
    moe_layer_pattern=(0, 1),
    moe_router_pre_softmax=True,
    moe_router_topk_scaling_factor=1.5,
)
OPS = ReferenceOps()


def tensors(model: ModelDescription) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5
        for name, shape in layer_tensors(model, 1).items()
    }


def expected(x: torch.Tensor, weights: dict[str, torch.Tensor], model: ModelDescription):
    """Token by token: the k largest of the softmax, unnormalised; then the shared experts."""

    def swiglu(x: torch.Tensor, prefix: str) -> torch.Tensor:
        gate, up = (weights[f"{prefix}.linear_fc1.weight"] @ x).chunk(2)
        return weights[f"{prefix}.linear_fc2.weight"] @ (silu(gate) * up)

    rows = []
    for token in x:
        scores = (weights["mlp.router.weight"] @ token).softmax(0)
        row = swiglu(token, "mlp.shared_experts")
        for e in scores.argsort(descending=True)[: model.moe_router_topk].tolist():
            row = row + 1.5 * scores[e] * swiglu(token, f"mlp.experts.experts.{e}")
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_every_way_and_every_cut_is_the_same_sum(tokens, tp):
    weights = tensors(MODEL)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = expected(x, weights, MODEL)
    for static in (False, True):
        parts = [
            run_mlp(
                x,
                load_mlp(MODEL, 1, weights.__getitem__, tp, rank, torch.Tensor.contiguous),
                MODEL,
                OPS,
                static,
            )
            for rank in range(tp)
        ]
        # Routing scores are float32.
        torch.testing.assert_close(sum(parts), wanted, rtol=0, atol=1e-6)


def test_few_tokens_gather_and_many_take_every_expert(monkeypatch):
    weights = load_mlp(MODEL, 1, tensors(MODEL).__getitem__, 1, 0, torch.Tensor.float)
    ran = []
    for way in ("_by_expert", "_gathered", "_all_experts"):
        real = getattr(mlp, way)
        monkeypatch.setattr(
            mlp, way, lambda *args, way=way, real=real: ran.append(way) or real(*args)
        )
    for tokens, static in ((1, True), (2, True), (1, False)):
        run_mlp(torch.ones(tokens, 64), weights, MODEL, OPS, static)
    assert ran == ["_gathered", "_all_experts", "_by_expert"]


def test_a_decoding_step_asks_the_device_for_nothing():
    weights = {name: weight.float() for name, weight in tensors(MODEL).items()}
    with FakeTensorMode() as fake:
        weights = {name: fake.from_tensor(weight) for name, weight in weights.items()}
        loaded = load_mlp(MODEL, 1, weights.__getitem__, 1, 0, torch.Tensor.contiguous)
        for tokens in (1, 5):
            out = run_mlp(torch.empty(tokens, 64), loaded, MODEL, OPS, static=True)
            assert out.shape == (tokens, 64)
        with pytest.raises(DynamicOutputShapeException):
            run_mlp(torch.empty(5, 64), loaded, MODEL, OPS, static=False)


def test_an_expert_that_overflows_reaches_only_the_tokens_that_chose_it():
    weights = tensors(MODEL)
    weights["mlp.router.weight"][3] = -weights["mlp.router.weight"][:3].sum(0)
    weights["mlp.experts.experts.3.linear_fc1.weight"] *= 1e200
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    loaded = load_mlp(MODEL, 1, weights.__getitem__, 1, 0, torch.Tensor.contiguous)
    finite = [run_mlp(x, loaded, MODEL, OPS, s).isfinite().all(1) for s in (False, True)]
    assert torch.equal(*finite)
    assert 0 < finite[0].sum() < 9


def test_generate_continues_with_the_likeliest_tokens(tmp_path):
    source = RandomFolder(MODEL)
    write_megatron(source, tmp_path / "model", progress=False)
    out = tmp_path / "out.jsonl"
    flags = ("--max-new-tokens", "8", "--ignore-eod", "--device", "cpu", "--output", str(out))
    prompt = "def experts"
    assert main([str(tmp_path / "model"), "--prompt", prompt, "--tokenizer", "byte", *flags]) == 0
    tokens = list(prompt.encode())
    opened = open_checkpoint(tmp_path / "model")
    for _ in range(8):
        with torch.no_grad():
            *_, state = hidden_states(opened, torch.tensor([tokens]))
            tokens.append(int(logits(opened, state)[-1, 0].argmax()))
    record = json.loads(out.read_text())
    assert record["tokens"] == tokens[len(prompt) :]
