"""Repairs of megatron-core 0.19.2, each applied once and only where it is needed."""

from __future__ import annotations

import functools
import sys
import types

import torch


@functools.cache
def use_prebuilt_dataset_helpers() -> None:
    """The wheel ships its dataset index builder built, but no Makefile to build it with.

    Raises:
        ImportError: if the built helper is missing for this Python.
    """
    import megatron.core.datasets.helpers_cpp  # noqa: F401  (fails here, not mid-training)
    import megatron.core.datasets.utils as utils

    utils.compile_helpers = lambda: None


@functools.cache
def repair_torch_adamw_resume() -> None:
    """Without Transformer Engine or APEX the distributed optimizer wraps torch's AdamW, and on
    resume wants a step before there is any state, misses `step` among the states it loads, then
    shares one step tensor among all parameters."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    cls = distrib_optimizer.DistributedOptimizer
    set_states, load_state_dict = cls._set_main_param_and_optimizer_states, cls.load_state_dict
    state_dict = cls.state_dict

    def state_dict_with_state(self):
        if not self.optimizer.state and isinstance(self.optimizer, torch.optim.Adam):
            for param in (p for group in self.optimizer.param_groups for p in group["params"]):
                moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[param] = {"step": torch.tensor(0.0), **moments}
        return state_dict(self)

    def set_with_step(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        step = self.optimizer.state[main_param].get("step")
        set_states(self, model_param, {"step": step, **tensors})

    def load_with_own_steps(self, state_dict):
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    cls.state_dict = state_dict_with_state
    cls._set_main_param_and_optimizer_states = set_with_step
    cls.load_state_dict = load_with_own_steps


@functools.cache
def take_up_moments_at_another_rate() -> None:
    """A resumed optimizer finds its groups of parameters by the rates they were given, so that
    --override-opt-param-scheduler, which asks for others, finds none. Saved groups are given this
    run's rates first; what else tells groups apart stays."""
    from megatron.core.optimizer import distrib_optimizer, optimizer
    from megatron.training import get_args

    rates = ("max_lr", "min_lr", "start_wd", "end_wd")
    others = [key for key in optimizer.param_group_identifier_keys if key not in rates]

    def with_these_rates(current: list[dict], saved: list[dict]) -> list[dict]:
        if not get_args().override_opt_param_scheduler:
            return saved
        here: dict[tuple, list[dict]] = {}
        for group in current:
            here.setdefault(tuple(group.get(key) for key in others), []).append(group)
        given = []
        for group in saved:
            same = here.get(tuple(group.get(key) for key in others), [])
            # Groups that only their rates tell apart cannot be told apart by other rates.
            own = same[0] if len(same) == 1 else {}
            given.append(group | {key: own[key] for key in rates if key in own})
        return given

    cls = optimizer.MegatronOptimizer
    pair = cls._filter_and_reorder_param_groups
    load_sharded = distrib_optimizer.DistributedOptimizer.load_state_dict

    def pair_by_other_keys(current_groups: list[dict], state_dict_groups: list[dict]):
        return pair(current_groups, with_these_rates(current_groups, state_dict_groups))

    def load_state_dict(self, state_dict):
        inner = state_dict.get("optimizer")
        if isinstance(inner, dict) and "param_groups" in inner:
            groups = with_these_rates(self.optimizer.param_groups, inner["param_groups"])
            state_dict = state_dict | {"optimizer": inner | {"param_groups": groups}}
        return load_sharded(self, state_dict)

    cls._filter_and_reorder_param_groups = staticmethod(pair_by_other_keys)
    distrib_optimizer.DistributedOptimizer.load_state_dict = load_state_dict


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


@functools.cache
def name_failed_checkpoint_writes() -> None:
    """A checkpoint file cannot be written: of the error the writer reports only its type."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    write = FileSystemWriterAsync.write_preloaded_data

    def write_or_raise(*args, **kwargs):
        result = write(*args, **kwargs)
        if kwargs.get("results_queue") is None and isinstance(result[1], Exception):
            raise result[1]
        return result

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write_or_raise)
