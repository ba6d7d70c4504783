"""Fine-grained activation offloading of the attention's parts, with the CPU standing for a GPU.

Megatron's bookkeeping runs as it is; streams do nothing, host memory is not pinned, and tensors of
the CPU count as a GPU's. tests/gpu/test_offload_gpu.py has streams and the memory itself.
"""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from megatron.core.pipeline_parallel import fine_grained_activation_offload as upstream
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_mlra.training.cpu_backend import NoStream
from support.modules import BATCH, FORMS, MLRA2, TOKENS, build, named
from support.offload_host import replacements
from support.oracle import reference

GATED = replace(MLRA2, gate=True)
ALL = ["qkv_linear", "core_attn", "attn_proj"]
Interface = upstream.FineGrainedActivationOffloadingInterface


@pytest.fixture
def host(monkeypatch):
    """Megatron's offloading manager where the CPU is device and host."""
    for name, value in {
        "Stream": NoStream,
        "Event": NoStream,
        "current_stream": lambda *_: NoStream(),
        "stream": lambda _: nullcontext(),
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    for where, name, value in replacements():
        monkeypatch.setattr(where, name, value)
    Interface.reset_instance()
    yield upstream.PipelineOffloadManager.get_instance
    monkeypatch.setattr(upstream.PipelineOffloadManager, "OFFLOAD_MGR", None)


class Stack(torch.nn.Module):
    """Two attentions, one behind the other: Megatron never offloads a module's last group."""

    def __init__(self, groups, parameters, case=GATED, **overrides) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            build(case, groups, parameters, **overrides) for _ in range(2)
        )
        self.alive: dict[str, StorageWeakRef] = {}
        self.absorbed = 0
        for number, layer in enumerate(self.layers):
            layer.latent_functions = self._counting(layer.latent_functions)
            for name in ("linear_q_up_proj", "core_attention", "linear_proj"):
                module = getattr(layer, name)
                module.register_forward_hook(self._watch(f"{number} {name}"))

    def _counting(self, functions) -> SimpleNamespace:
        def rotate_absorb(*args):
            self.absorbed += 1
            return functions.rotate_absorb(*args)

        return SimpleNamespace(**vars(functions) | {"rotate_absorb": rotate_absorb})

    def _watch(self, name: str):
        def hook(_module, inputs, output) -> None:
            output = output[0] if isinstance(output, tuple) else output
            self.alive[f"{name} out"] = StorageWeakRef(output.untyped_storage())
            self.alive[f"{name} in"] = StorageWeakRef(inputs[0].untyped_storage())

        return hook

    def step(self, x, upstream_gradient) -> dict[str, torch.Tensor]:
        """Output and gradients of a step; `kept` are the watched tensors of the first attention
        that live between forward and backward."""
        self.zero_grad()
        x = x.float().requires_grad_()
        if self.layers[0].config.fine_grained_activation_offloading:
            Interface.init_chunk_handler(0, None, None, 1, 0, 1.0)
        output = x
        for layer in self.layers:
            output = layer(output, None)[0]
        self.kept = {name for name, ref in self.alive.items() if not ref.expired()}
        (output * upstream_gradient.float()).sum().backward()
        grads = {
            f"{i} {name}": p.grad.clone()
            for i, layer in enumerate(self.layers)
            for name, p in named(layer).items()
        }
        if self.layers[0].config.fine_grained_activation_offloading:
            Interface.reset()
        return {"output": output.detach(), "x": x.grad} | grads


def offloading(modules: list[str]) -> dict:
    return {
        "fine_grained_activation_offloading": True,
        "offload_modules": modules,
        "min_offloaded_tensor_size": 1,
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("modules", [ALL, ALL[:1], ALL[1:2], ALL[1:]], ids="+".join)
def test_offloading_changes_no_bit(modules, form, groups, host):
    expected = reference(GATED, TOKENS, BATCH)
    plain = Stack(groups, expected.parameters, core_form=form)
    wanted = plain.step(expected.x, expected.upstream)
    stack = Stack(groups, expected.parameters, core_form=form, **offloading(modules))
    for _ in range(3):  # the first tells Megatron what there is to offload
        actual = stack.step(expected.x, expected.upstream)
        assert actual.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(actual[name], tensor), name
        assert host()._is_warmup is False
        assert stack.absorbed == (4 if form == "absorbed" else 0), "once forward, once backward"
        stack.absorbed = 0
        chunk = host()._cached_chunks_forward[0]
        assert [group._name for group in chunk.offload_groups] == modules * 2
        assert not any(group._tensors for group in chunk.offload_groups), "saved and never read"
        # What a group offloads is nowhere else in the device's memory.
        absorbed = form == "absorbed"
        for module, name in (
            ("core_attn", "0 linear_q_up_proj out" if absorbed else "0 core_attention in"),
            ("attn_proj", "0 linear_proj in"),
            ("qkv_linear", "0 linear_q_up_proj in"),
        ):
            assert name in plain.kept
            assert (name in stack.kept) == (module not in modules)
    summary = host().offload_summary_bytes
    assert set(summary) == set(modules)


def test_shared_memory_is_copied_once_and_weights_stay(groups, host):
    expected = reference(GATED, TOKENS, BATCH)
    stack = Stack(groups, expected.parameters, core_form="absorbed", **offloading(ALL[1:2]))
    stack.step(expected.x, expected.upstream)
    config = stack.layers[0].config
    rows, h, n = TOKENS * BATCH, config.num_attention_heads, config.num_branches
    d_l, d_r = config.latent_dim, config.qk_rope_head_dim
    pools = host().cpu_tensor_pool._pools.values()
    copied = [tensor.numel() for pool in pools for tensor in pool["all"]]
    # The queries before absorption, and the core's output, each once though two operations keep
    # it. No weight is among them, and no absorbed query: on a CPU, torch's core spreads keys,
    # values and output to its size.
    assert copied.count(rows * h * config.qk_dim) == 2
    weight = stack.layers[0].linear_kv_up_proj.weight.numel()
    assert weight not in copied
    assert copied.count(rows * n * h * (d_l + d_r)) == 6


def test_evaluation_offloads_nothing(groups, host):
    expected = reference(MLRA2, TOKENS, BATCH)
    attention = build(MLRA2, groups, expected.parameters, **offloading(ALL))
    Interface.init_chunk_handler(0, None, None, 1, 0, 1.0)
    with torch.no_grad():
        attention(expected.x.float(), None)
    assert host()._cached_chunks_forward[0].offload_groups == []


def test_delayed_weight_gradients_reach_every_linear(groups):
    attention = build(GATED, groups, reference(GATED, TOKENS, BATCH).parameters)
    called = []
    for name, module in attention.named_children():
        if name.startswith("linear") and name != "linear_kv_up_proj":
            module.backward_dw = Mock(side_effect=lambda name=name: called.append(name))
    attention.backward_dw()
    assert called == [
        "linear_gate_proj",
        "linear_kv_down_proj",
        "linear_q_up_proj",
        "linear_q_down_proj",
        "linear_proj",
    ]
