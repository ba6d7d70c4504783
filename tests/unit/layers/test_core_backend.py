"""Which core `--core-backend` stands for."""

import pytest
import torch

from megatron_mlra.layers import specs
from megatron_mlra.layers.config import MLRAConfig, resolve_latent_kernels

SIZES = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 128,
    "qk_head_dim": 32,
    "qk_pos_emb_head_dim": 16,
    "v_head_dim": 32,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "bf16": True,
}


@pytest.fixture(autouse=True)
def installed(monkeypatch) -> None:
    monkeypatch.setattr(specs, "HAVE_TE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def core_of(**overrides):
    config = MLRAConfig(**SIZES)
    for name, value in {"transformer_impl": "transformer_engine", **overrides}.items():
        setattr(config, name, value)
    return specs.core_backend(config)


@pytest.mark.parametrize(
    ("overrides", "core"),
    [
        ({}, "mlra_kernels"),
        ({"transformer_impl": "local"}, "torch"),
        ({"core_backend": "te"}, "te"),
        ({"core_backend": "torch"}, "torch"),
        ({"core_backend": "mlra_kernels"}, "mlra_kernels"),
        ({"core_backend": "mlra_kernels", "transformer_impl": "local"}, "mlra_kernels"),
        ({"bf16": False}, "te"),
        ({"core_form": "materialized"}, "te"),
        ({"attention_dropout": 0.1}, "te"),
        ({"deterministic_mode": True}, "te"),
        ({"fp8_dot_product_attention": True}, "te"),
        ({"qk_pos_emb_head_dim": 8}, "te"),
        ({"qk_pos_emb_head_dim": 0}, "te"),
    ],
    ids=str,
)
def test_choice(overrides, core) -> None:
    assert core_of(**overrides) == core


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_other_gpus(capability, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert core_of() == "te"
    with pytest.raises(ValueError, match="core_backend mlra_kernels runs on Hopper GPUs"):
        core_of(core_backend="mlra_kernels")


def test_another_triton(monkeypatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.7.1")
    assert core_of() == "te"
    with pytest.raises(ValueError, match=r"needs Triton 3.6 and 3.7.1 is installed; use that, or"):
        core_of(core_backend="mlra_kernels")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"deterministic_mode": True}, "sums gradients in any order and deterministic_mode is on"),
        ({"fp8_dot_product_attention": True}, "has no FP8 and fp8_dot_product_attention is on"),
        ({"attention_dropout": 0.1}, "has no dropout and attention_dropout is 0.1; use 0"),
    ],
    ids=str,
)
def test_refused(overrides, said) -> None:
    with pytest.raises(
        ValueError, match=f"core_backend mlra_kernels {said}.*, or core_backend auto"
    ):
        core_of(core_backend="mlra_kernels", **overrides)


def test_kernels_of_projections_need_something_to_rotate() -> None:
    for rope_dim, kernels in ((16, "mlra_kernels"), (0, "torch")):
        assert resolve_latent_kernels("auto", "transformer_engine", rope_dim) == kernels
        assert resolve_latent_kernels("auto", "local", rope_dim) == "torch"
