"""Megatron without a GPU: the whole of Megatron-core and its trainer on CPU tensors and gloo.

Megatron names CUDA devices, streams and random states throughout. `enable_cpu_backend` maps them
onto the CPU for the life of the process, so that training, checkpoints and every parallelism run
unchanged. (Context parallelism of Megatron's own attention needs Transformer Engine, and with it a
GPU.) Call `enable_cpu_backend` before a Megatron model is built; it cannot be undone.
"""

from __future__ import annotations

import functools
import os
import types
import warnings
from contextlib import nullcontext

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")

CPU_DEFAULTS = {
    "distributed_backend": "gloo",
    "pipeline_model_parallel_comm_backend": None,
    "use_cpu_initialization": True,
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "tp_comm_overlap": False,
    "moe_router_fusion": False,
    "moe_permute_fusion": False,
    "optimizer_cuda_graph": False,
    "record_memory_history": False,
    "use_sharp": False,
    "log_device_memory_used": False,
    "gpu_sniff_test_interval": None,
}
"""Argument values (by argparse dest) that Megatron needs on a CPU."""


class _CudaAsCpu(TorchFunctionMode):
    """Reads every CUDA device argument as the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        args = tuple(_on_cpu(a) for a in args)
        out = func(*args, **{name: _on_cpu(value) for name, value in kwargs.items()})
        if func is torch.Tensor.type and isinstance(out, str):
            # Megatron's optimizer tells float types apart by the name of their CUDA tensor type.
            return out.replace("torch.", "torch.cuda.", 1)
        return out


def _on_cpu(value):
    if isinstance(value, torch.device):
        return _CPU if value.type == "cuda" else value
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    return value


class NoStream:
    """A CUDA stream or event that has nothing to wait for."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, _event=None) -> NoStream:
        return self

    def elapsed_time(self, _other) -> float:
        return 0.0

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


@functools.cache
def enable_cpu_backend() -> None:
    """Map Megatron's use of CUDA onto the CPU; later calls do nothing.

    Raises:
        RuntimeError: if CUDA has been initialised in this process.
    """
    if torch.cuda.is_initialized():
        raise RuntimeError("enable_cpu_backend() must be called before CUDA is used")
    # torch.compile, behind Megatron's jit_fuser, would build C++ for a minute on a CPU. The
    # variable has an effect only if Megatron is not imported yet.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    torch.compiler.set_stance("force_eager")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # These modules read the CUDA random state when they are imported, so import them before the
    # random state is replaced.
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    import megatron.training.training  # noqa: F401

    stream = NoStream()
    properties = types.SimpleNamespace(
        major=9, minor=0, name="cpu", total_memory=0, multi_processor_count=1, gcnArchName=""
    )
    for name, value in {
        "current_device": lambda: _CPU,
        "device_count": lambda: 1,
        "set_device": lambda *_: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "stream": lambda *_: nullcontext(),
        "Stream": NoStream,
        "Event": NoStream,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed": torch.default_generator.manual_seed,
        "is_current_stream_capturing": lambda: False,
        "reset_peak_memory_stats": lambda *_: None,
        "max_memory_allocated": lambda *_: 0,
        "max_memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "memory_stats": lambda *_: _ZeroStats(),
    }.items():
        setattr(torch.cuda, name, value)
    torch.nn.Module.cuda = lambda self, device=None: self
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    warnings.filterwarnings("ignore", message="CPU RNG state changed within GPU RNG context")
    token_dispatcher.maybe_move_tensor_to_cpu = _as_host_value
    _CudaAsCpu().__enter__()


def _as_host_value(tensor, as_numpy: bool = False, record_stream: bool = False):
    """Megatron's maybe_move_tensor_to_cpu, for tensors that are on the CPU already."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


class _ZeroStats(dict):
    def __missing__(self, key: str) -> int:
        return 0
