"""Checks that a run can load a checkpoint's optimizer and schedule, before the model is built.

Megatron would fail during the load, with a KeyError or an assertion that names no flag.
"""

from __future__ import annotations

import copy
import re
from argparse import Namespace
from typing import Any

from megatron_mlra.checkpoint.megatron.torch_dist import TorchDistFolder
from megatron_mlra.command_line.parser import flag

_STATE = re.compile(r"(chained_\d+\.)?optimizer\.")
_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.state\.fp32_param\.")
"""float32 copies of 16-bit weights, as the optimizer without `--use-distributed-optimizer` has."""

_SCHEDULE = {
    "max_lr": "lr",
    "min_lr": "min_lr",
    "lr_decay_style": "lr_decay_style",
    "start_wd": "start_weight_decay",
    "end_wd": "end_weight_decay",
    "wd_incr_style": "weight_decay_incr_style",
}
"""Key of the schedule's state -> the argument from which Megatron sets it."""

_KIND = "param_state_sharding_type"

_CUTS = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
_CUTS_OF_EXPERTS = ("expert_model_parallel_size", "expert_tensor_parallel_size")

_FRESH = "add --no-load-optim to go on with fresh moments, or --finetune for a new run"


def check_optimizer(stored: TorchDistFolder, args: Namespace) -> None:
    """Compare a checkpoint's optimizer and schedule with those of this run.

    Raises:
        ValueError: names the checkpoint, the differences and the flags that resolve them.
    """
    if stored.path.name == "release" or args.finetune or args.no_load_optim or args.skip_train:
        return
    state = stored.common_state()
    saved = state.get("args")
    if not any(_STATE.match(name) for name in stored.shapes()):
        raise ValueError(
            f"checkpoint {stored.path} holds no optimizer (saved with --no-save-optim, or"
            f" converted); {_FRESH}"
        )
    there, here = _precision(saved), _precision(args)
    if there != here:
        raise ValueError(
            f"checkpoint {stored.path} has an optimizer of {there} weights, and this run trains in"
            f" {here}; train in {there}, or {_FRESH}"
        )
    for name in ("optimizer", "muon_scalar_optimizer", "use_distributed_optimizer"):
        there, here = _of_optimizer(saved, name), _of_optimizer(args, name)
        if there is not None and there != here:
            raise ValueError(
                f"checkpoint {stored.path} was saved with {flag(name)} {there}, and this run has"
                f" {here}; use the same, or {_FRESH}"
            )
    _check_layout(stored, state, saved, args)
    if getattr(args, "num_experts", None):
        _check_experts(stored, saved, args)
    _check_schedule(stored, state.get("opt_param_scheduler"), saved, args)


def before_first_update(stored: TorchDistFolder) -> bool:
    """Whether a checkpoint was saved before its optimizer, which makes its moments in its first
    update, had any: fp16 skips steps until its loss scale fits."""
    found = [name for name in stored.shapes() if _STATE.match(name)]
    return bool(found) and all(_WEIGHTS.match(name) for name in found)


def _check_layout(stored: TorchDistFolder, state: dict, saved: Any, args: Namespace) -> None:
    """Refuse another layout than that of parts that each rank saved as it held them."""
    optimizer = state.get("optimizer")
    parts = optimizer.values() if isinstance(optimizer, dict) else ()
    kinds = {each.get(_KIND) for each in (optimizer, *parts) if isinstance(each, dict)}
    if "dp_reshardable" not in kinds:
        return
    different = [
        f"{flag(name)} is {there} there, {here} here"
        for name in (*_CUTS, *(_CUTS_OF_EXPERTS if getattr(args, "num_experts", None) else ()))
        if (there := getattr(saved, name, 1)) != (here := getattr(args, name))
    ]
    if different:
        raise ValueError(
            f"checkpoint {stored.path} has each rank's own part of the optimizer"
            f" (dist_ckpt_optim_fully_reshardable: false): {'; '.join(different)}; use the same,"
            f" or {_FRESH}"
        )


def _check_experts(stored: TorchDistFolder, saved: Any, args: Namespace) -> None:
    """Megatron has groups of parameters of their own for experts that are spread over ranks."""
    there = getattr(saved, "expert_model_parallel_size", 1)
    here = args.expert_model_parallel_size
    if (there > 1) != (here > 1):
        same = "one above 1" if there > 1 else "1"
        raise ValueError(
            f"checkpoint {stored.path} has the optimizer of --expert-model-parallel-size {there},"
            f" and this run has {here}: Megatron stores that of a size above 1 in another way; use"
            f" {same}, or {_FRESH}"
        )


def _precision(args: Any) -> str:
    return next((name for name in ("bf16", "fp16") if getattr(args, name, False)), "float32")


def _of_optimizer(args: Any, name: str) -> Any:
    if name == "muon_scalar_optimizer" and getattr(args, "optimizer", None) != "muon":
        return None  # of no effect
    # For optimizers of whole matrices (Muon) Megatron replaces the one flag by the other.
    if name == "use_distributed_optimizer" and getattr(
        args, "use_layer_wise_distributed_optimizer", False
    ):
        return True
    return getattr(args, name, None)


def _check_schedule(stored: TorchDistFolder, saved: Any, then: Any, args: Namespace) -> None:
    if not isinstance(saved, dict):
        return
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    different = [
        f"{flag(name)} is {saved[key]} there, {getattr(args, name)} here"
        for key, name in _SCHEDULE.items()
        if key in saved and saved[key] != getattr(args, name)
    ]
    for key, steps in _samples(args).items():
        if key in saved and saved[key] != steps:
            what = _LENGTHS[key]
            different.append(f"{what} is {saved[key]:,.0f} samples there, {steps:,.0f} here")
    if different:
        batch = getattr(then, "global_batch_size", None)
        if batch is not None and batch != args.global_batch_size:
            different.append(f"--global-batch-size is {batch} there, {args.global_batch_size} here")
        raise ValueError(
            f"checkpoint {stored.path} was saved by a run of another schedule:"
            f" {'; '.join(different)}; keep the checkpoint's, or add --override-opt-param-scheduler"
            " to take this run's (which extends a run, and spreads the decay over its new length),"
            " or --use-checkpoint-opt-param-scheduler to take the checkpoint's (further steps are"
            " at its last rate)"
        )


_LENGTHS = {
    "lr_warmup_steps": "the warm-up (--lr-warmup-iters)",
    "lr_decay_steps": "the decay (--lr-decay-iters, else --train-iters)",
    "wd_incr_steps": "the whole run (--train-iters)",
}


def _samples(args: Namespace) -> dict[str, float]:
    """Key of the schedule's state -> length in samples, as Megatron computes it."""
    if args.train_iters:
        decay = (args.lr_decay_iters or args.train_iters) * args.global_batch_size
        warmup = args.lr_warmup_iters * args.global_batch_size
    else:
        decay, warmup = args.lr_decay_samples or args.train_samples, args.lr_warmup_samples
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    whole = args.train_samples or args.train_iters * args.global_batch_size
    return {"lr_warmup_steps": warmup, "lr_decay_steps": decay, "wd_incr_steps": whole}


def other_end(scheduler: Any, args: Namespace) -> str | None:
    """A warning if a resumed run ends at another learning rate than its schedule says, or None. The
    schedule counts samples of steps that were not skipped; earlier ones may have had another global
    batch size. Without the optimizer's state Megatron loads none of the schedule, which then begins
    anew.

    Args:
        scheduler: Megatron's, with the checkpoint's state loaded.
        args: with `iteration`, the step of the checkpoint, and `consumed_train_samples`.
    """
    if not args.train_iters or scheduler.lr_decay_style == "constant":
        return None
    batch, fix = args.global_batch_size, "--lr-decay-iters"
    left, whole = (args.train_iters - args.iteration) * batch, args.train_iters * batch
    if args.train_samples:
        left, whole = args.train_samples - args.consumed_train_samples, args.train_samples
        batch, fix = 1, "--lr-decay-samples"
    ends = [_rate_after(scheduler, count) for count in (scheduler.num_steps + left, whole)]
    if left <= 0 or abs(ends[0] - ends[1]) <= 1e-3 * max(ends):
        return None
    why = "another --global-batch-size than before, and the rate decays by samples"
    if args.train_samples or args.consumed_train_samples == args.iteration * batch:
        why = "skipped steps (not finite in fp16) do not move the rate's decay"
        if not args.fp16:
            why = "the rate's schedule began anew in this run (--no-load-optim)"
    if args.no_load_optim:
        why = "--no-load-optim begins the rate's schedule anew"
    return (
        f"warning: {why}: it will"
        f" be {ends[0]:.3g} after the last step, not {ends[1]:.3g}; {fix}"
        f" {-(-(scheduler.num_steps + left) // batch)} ends it there"
    )


def _rate_after(scheduler: Any, samples: int) -> float:
    later = copy.copy(scheduler)
    later.num_steps = samples
    return later.get_lr({})
