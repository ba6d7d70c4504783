"""Refuses a model that surely does not fit this machine's memory, before the model is built.

Without this check, a run that is far too large allocates until the system kills it, without a word.
The check counts weights, gradients and optimizer state alone, and whatever may reduce them as
absent, so that no run that fits is refused.
"""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

import psutil
import torch

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.planner.layout import Layout
from megatron_mlra.planner.memory import GIB, optimizer_bytes, rank_parameters
from megatron_mlra.training.dry_run import UNEVEN

UNCOUNTED = (
    "use_megatron_fsdp",
    "use_torch_fsdp2",
    "init_model_with_meta_device",
    *UNEVEN,
    "fp8_param_gather",
    "fp4_param_gather",
)
"""Arguments that cut or store weights in ways that are not counted. Such runs are not checked."""

_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""Files of a container's limit, of version 2 and 1. psutil sees the host's memory alone."""


def check(args: Namespace, shape: ModelDescription, layout: Layout, on_cpu: bool) -> None:
    """Refuse a run whose weights, gradients and optimizer state exceed the free memory.

    Args:
        args: validated.
        layout: of the run.
        on_cpu: the ranks of this host share its memory; else each rank has a GPU.

    Raises:
        ValueError: one line with both sizes and the ways out.
    """
    need = least_bytes(args, shape, layout)
    if need is None:
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if on_cpu else 1
    if on_cpu:
        free = free_host_bytes()
    else:
        free = torch.cuda.mem_get_info(args.local_rank % torch.cuda.device_count())[0]
    if need * ranks <= free:
        return
    each = f", {need * ranks / GIB:.1f} for the {ranks} ranks of this host" if ranks > 1 else ""
    divide = ""
    if layout.dp * layout.cp > 1 and not layout.distributed_optimizer:
        divide = "--use-distributed-optimizer, "
    where = "memory" if on_cpu else "the GPU"
    raise ValueError(
        f"this model needs at least {need / GIB:.1f} GiB per rank for weights, gradients and"
        f" optimizer state{each}, and {free / GIB:.1f} GiB of {where} are free; use {divide}a"
        " smaller preset (--config debug), or more GPUs (mlra plan says how many)"
    )


def least_bytes(args: Namespace, shape: ModelDescription, layout: Layout) -> int | None:
    """Bytes that every rank needs at least; None if they cannot be counted. Of pipeline stages, the
    one with the fewest parameters counts.

    Args: see `check`.
    """
    if any(getattr(args, name, None) for name in UNCOUNTED):
        return None
    expert_tp = getattr(args, "expert_tensor_parallel_size", None)
    if shape.num_layers % layout.pp or expert_tp not in (None, layout.tp):
        return None
    stages = (rank_parameters(shape, layout, stage) for stage in range(layout.pp))
    dense, experts = min(stages, key=sum)
    half = args.bf16 or args.fp16
    held = (dense + experts) * (2 if half else 4)
    if args.skip_train:
        return held
    in_float32 = not half or args.accumulate_allreduce_grads_in_fp32
    held += (dense + experts) * (4 if in_float32 else 2)
    # Other optimizers keep less than Adam's two moments, and Muon may divide them.
    is_counted = args.optimizer == "adam" and not (
        args.use_precision_aware_optimizer or args.optimizer_cpu_offload
    )
    return held + (optimizer_bytes(dense, experts, layout, half) if is_counted else 0)


def free_host_bytes(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory and swap that are free on this host, at most the limit of its container.

    Args:
        cgroups: folder of the container's limits.
    """
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    for name in _LIMITS:
        try:
            free = min(free, int((cgroups / name).read_text(encoding="ascii")))
        except (OSError, ValueError):  # `max`: no limit
            continue
    return free
