"""Repairs of megatron-core 0.19.2, each only where it is needed.

The functions of (what stands there, the run) are rows of training/hooks.py, which names their
targets. Without Transformer Engine or APEX, Megatron's distributed optimizer wraps torch's AdamW,
whose state it does not know how to resume: three of them are about that.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE


def use_prebuilt_dataset_helpers(compile_helpers: Callable, run: Any) -> Callable:
    """`compile_helpers` without its Makefile, which the wheel does not ship.

    Raises:
        ImportError: if the built helper is missing for this Python.
    """
    import megatron.core.datasets.helpers_cpp  # noqa: F401  (fails here, not mid-training)

    return lambda: None


def state_dict_with_state(state_dict: Callable, run: Any) -> Callable:
    """`state_dict`, which on resume wants a step before there is any state."""

    def with_state(self):
        if not self.optimizer.state and isinstance(self.optimizer, torch.optim.Adam):
            for param in (p for group in self.optimizer.param_groups for p in group["params"]):
                moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[param] = {"step": torch.tensor(0.0), **moments}
        return state_dict(self)

    return state_dict if HAVE_APEX_OR_TE else with_state


def set_states_with_step(set_states: Callable, run: Any) -> Callable:
    """`_set_main_param_and_optimizer_states`, which misses `step` among the states it loads."""

    def set_with_step(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        step = self.optimizer.state[main_param].get("step")
        set_states(self, model_param, {"step": step, **tensors})

    return set_states if HAVE_APEX_OR_TE else set_with_step


def load_with_own_steps(load_state_dict: Callable, run: Any) -> Callable:
    """`load_state_dict`, which shares one step tensor among all parameters."""

    def load(self, state_dict):
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    return load_state_dict if HAVE_APEX_OR_TE else load


def raise_failed_writes(write: Callable, run: Any) -> Callable:
    """`write_preloaded_data`, whose caller reports only the type of the error that it returns."""

    def write_or_raise(*args, **kwargs):
        result = write(*args, **kwargs)
        if kwargs.get("results_queue") is None and isinstance(result[1], Exception):
            raise result[1]
        return result

    return write_or_raise


@functools.cache
def accumulate_weight_gradients_in_products() -> bool:
    """Weight gradients are added to their float32 buffer inside the product, not in a pass of
    their own, for which Megatron asks for APEX; Transformer Engine's matrix product does it too.

    Returns:
        Whether that is possible here.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.tensor_parallel import layers

    if not layers._grad_accum_fusion_available and HAVE_TE:
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        def accumulate(inputs: torch.Tensor, grad_output: torch.Tensor, out: torch.Tensor) -> None:
            """out `[o, i]` += grad_output `[t, o]`^T inputs `[t, i]`."""
            general_gemm(
                inputs, grad_output, out.dtype, layout="NT", out=out, accumulate=True, grad=True
            )

        apex = types.ModuleType("fused_weight_gradient_mlp_cuda")
        apex.wgrad_gemm_accum_fp32 = apex.wgrad_gemm_accum_fp16 = accumulate
        layers.fused_weight_gradient_mlp_cuda = sys.modules[apex.__name__] = apex
        layers._grad_accum_fusion_available = True
    return layers._grad_accum_fusion_available
