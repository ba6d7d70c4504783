"""Repairs of megatron-core 0.19.2, each applied only where it is needed.

Functions of (a function of Megatron, the run) are wrappers, for which training/hooks.py names the
targets. Without Transformer Engine and APEX, Megatron's distributed optimizer wraps torch's AdamW,
and cannot resume AdamW's state. `state_dict_with_state`, `set_states_with_step` and
`load_with_own_steps` repair that.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from megatron.core.optimizer.optimizer import param_group_identifier_keys


def use_prebuilt_dataset_helpers(compile_helpers: Callable, run: Any) -> Callable:
    """Replace `compile_helpers`, which runs a Makefile that the wheel does not ship.

    Raises:
        ImportError: the wheel has no built helper for this Python.
    """
    import megatron.core.datasets.helpers_cpp  # noqa: F401  (fails here, not mid-training)

    return lambda: None


def state_dict_with_state(state_dict: Callable, run: Any) -> Callable:
    """Wrap `state_dict`, which on a resume asks for AdamW's state before there is any state."""

    def with_state(self):
        if not self.optimizer.state and isinstance(self.optimizer, torch.optim.Adam):
            for param in (p for group in self.optimizer.param_groups for p in group["params"]):
                moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[param] = {"step": torch.tensor(0.0), **moments}
        return state_dict(self)

    return state_dict if HAVE_APEX_OR_TE else with_state


def set_states_with_step(set_states: Callable, run: Any) -> Callable:
    """Wrap `_set_main_param_and_optimizer_states`, which takes `step` from loaded states.

    They hold none, or, where each rank saves its own part of the buckets, that of a new optimizer:
    0. The one that counts was loaded with the parameter groups.
    """

    def set_with_step(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        step = self.optimizer.state[main_param].get("step")
        set_states(self, model_param, {**tensors, "step": step})

    return set_states if HAVE_APEX_OR_TE else set_with_step


def load_with_own_steps(load_state_dict: Callable, run: Any) -> Callable:
    """Wrap `load_state_dict`, which leaves one `step` tensor shared by all parameters."""

    def load(self, state_dict):
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    return load_state_dict if HAVE_APEX_OR_TE else load


def load_without_moments(sharded_state_dict: Callable, run: Any) -> Callable:
    """Wrap `sharded_state_dict`, which on a resume asks for moments of a checkpoint without any:
    they are made in the first update, and fp16 may have skipped every step."""

    def sharded(self, model_state_dict, is_loading=False, **named):
        makes = is_loading and not run.args.before_first_update
        return sharded_state_dict(self, model_state_dict, makes, **named)

    return sharded


def start_with_momentum(start: Callable, run: Any) -> Callable:
    """Wrap `MegatronOptimizer.__init__`, whose SGD gets no function that makes the state which a
    resume loads into."""

    def init(self, optimizer, config, init_state_fn=None):
        if init_state_fn is None and config.optimizer == "sgd":
            init_state_fn = _zero_momentum
        start(self, optimizer, config, init_state_fn)

    return init


def _zero_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    for group in optimizer.param_groups:
        for param in group["params"] if group["momentum"] else ():
            optimizer.state[param].setdefault("momentum_buffer", torch.zeros_like(param))


def moments_of_the_optimizer(keys: property, run: Any) -> property:
    """Replace `optimizer_state_keys`, which goes by the flag `--optimizer`: with Lion the part of
    the weights that Adam takes was saved without its second moment."""

    def kept(self) -> tuple[str, ...]:
        is_lion = type(self.optimizer).__name__ == "Lion"
        return ("exp_avg",) if is_lion else ("exp_avg", "exp_avg_sq")

    return property(kept)


def raise_failed_writes(write: Callable, run: Any) -> Callable:
    """Wrap `write_preloaded_data`, so that it raises errors.

    Megatron's function returns an error, and its caller reports the error's type alone.
    """

    def write_or_raise(*args, **kwargs):
        result = write(*args, **kwargs)
        if kwargs.get("results_queue") is None and isinstance(result[1], Exception):
            raise result[1]
        return result

    return write_or_raise


def pair_at_other_rates(pair: Callable, run: Any) -> Callable:
    """Wrap `_filter_and_reorder_param_groups`, which tells parameter groups apart by their rates.

    With --override-opt-param-scheduler or --use-checkpoint-opt-param-scheduler the rates differ
    from the saved ones, and Megatron would find no group.
    """

    def pair_by_other_keys(current_groups: list[dict], state_dict_groups: list[dict]):
        if run.args.override_opt_param_scheduler:
            state_dict_groups = _with_rates_of(current_groups, state_dict_groups)
        elif run.args.use_checkpoint_opt_param_scheduler:
            current_groups = _with_rates_of(state_dict_groups, current_groups)
        return pair(current_groups, state_dict_groups)

    return pair_by_other_keys


def load_at_other_rates(load_state_dict: Callable, run: Any) -> Callable:
    """Wrap the distributed optimizer's `load_state_dict`, as `pair_at_other_rates` for groups."""

    def load(self, state_dict):
        inner = state_dict.get("optimizer")
        if isinstance(inner, dict) and "param_groups" in inner:
            here, there = self.optimizer.param_groups, inner["param_groups"]
            if run.args.override_opt_param_scheduler:
                groups = _with_rates_of(here, there)
                state_dict = state_dict | {"optimizer": inner | {"param_groups": groups}}
            elif run.args.use_checkpoint_opt_param_scheduler:
                for group, told in zip(here, _with_rates_of(there, here), strict=True):
                    group.update(told)
        return load_state_dict(self, state_dict)

    return load


def step_with_loaded_schedule(load_state_dict: Callable, run: Any) -> Callable:
    """Wrap the scheduler's `load_state_dict`, which sets the weight decay of the next step before
    it takes the checkpoint's with --use-checkpoint-opt-param-scheduler."""

    def load(self, state_dict):
        load_state_dict(self, state_dict)
        self.step(increment=0)

    return load


def _with_rates_of(others: list[dict], groups: list[dict]) -> list[dict]:
    """The parameter groups `groups` with the rates of those of `others` that match.

    Two groups match if all identifying keys but the rates are equal.
    """
    rates = ("max_lr", "min_lr", "start_wd", "end_wd")
    keys = [key for key in param_group_identifier_keys if key not in rates]
    there: dict[tuple, list[dict]] = {}
    for group in others:
        there.setdefault(tuple(group.get(key) for key in keys), []).append(group)
    given = []
    for group in groups:
        same = there.get(tuple(group.get(key) for key in keys), [])
        # Where several groups differ in rates alone, no match is certain, so the rates stay.
        found = same[0] if len(same) == 1 else {}
        given.append(group | {key: found[key] for key in rates if key in found})
    return given


@functools.cache
def accumulate_weight_gradients_in_products() -> bool:
    """Have matrix products add weight gradients to the float32 buffer, without a separate pass.

    Megatron needs APEX for that. Where APEX is missing, Transformer Engine's matrix product is put
    in its place.

    Returns:
        whether one of the two is available.
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
