"""Megatron's flags that change how a step runs, not what it computes: steps with and without.

Usage: python -m support.drivers.memory_flags FOLDER
"""

from __future__ import annotations

import json
import logging
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.variants import VARIANTS

STEPS = 5
STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_shared_expert_intermediate_size": 32,
    "moe_aux_loss_coeff": 0.0,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}
OVERLAP = {"overlap_moe_expert_parallel_comm": True}
OFFLOAD = {
    "fine_grained_activation_offloading": True,
    "offload_modules": ["attn_norm", "qkv_linear", "core_attn", "attn_proj"],
    "min_offloaded_tensor_size": 1,
}
LAYOUTS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "tensor": ({"tp": 2}, {"sequence_parallel": True, "latent_tp_layout": "latent"}),
    "context": ({"cp": 2}, {}),
    "pipeline": ({"pp": 2}, {"num_layers": 4}),
}
"""Where offloading is compared: layout and config."""
VARIATIONS = {
    "offloading": OFFLOAD,
    "overlap": OVERLAP,
    "early release": OVERLAP | {"ep_overlap_early_attn_memory_release": True},
    **{
        module: {"recompute_granularity": "selective", "recompute_modules": [module]}
        for module in ("mlp", "moe", "shared_experts")
    },
}


def main(folder: Path) -> None:
    import megatron_mlra.layers.specs  # noqa: F401  (loaded once, before the forks)
    from megatron_mlra.training.cpu_backend import enable_cpu_backend
    from support.world import run_world

    enable_cpu_backend()
    logging.disable(logging.WARNING)
    works = {"fsdp": fully_sharded, "experts": rearranged}
    works |= {name: partial(offloaded, name) for name in LAYOUTS}
    for name, work in works.items():

        def run(rank: int, name: str = name, work=work) -> None:
            found = work()
            if rank == 0:
                (folder / f"{name}.json").write_text(json.dumps(found))

        try:
            run_world(2, run, folder / f"world-{name}", timeout=200)
        except RuntimeError as error:
            (folder / f"{name}.json").write_text(json.dumps({"failed": str(error)}))


def fully_sharded() -> dict[str, Any]:
    """Losses and gradient norms of plain data parallel, and of Megatron-FSDP by strategy."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter

    from support import tiny
    from support.tiny import Layout, Tiny, make_config

    plain, layout = tiny.DistributedDataParallel, Layout(dp=2)
    layout.initialize()
    found = {}
    # einops is a package that the tests do without.
    mcore_fsdp_adapter.HAVE_EINOPS = True
    mcore_fsdp_adapter.einops = SimpleNamespace(rearrange=_mesh)
    for strategy in ("plain", *STRATEGIES):
        torch.manual_seed(1)
        config = make_config(layout, **VARIANTS["MLRA-4"], output_gate=True, zero_init_output=False)

        def sharded(config, ddp, model, strategy=strategy):
            ddp = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                use_megatron_fsdp=True,
                data_parallel_sharding_strategy=strategy,
                gradient_reduce_div_fusion=False,
            )
            return mcore_fsdp_adapter.FullyShardedDataParallel(config, ddp, model)

        tiny.DistributedDataParallel = plain if strategy == "plain" else sharded
        layout.distributed_optimizer = strategy != "plain"
        model = Tiny.build(config, layout)
        found[strategy] = [_step(model, seed) for seed in range(STEPS)]
    return found


def _mesh(mesh, pattern: str, **_: int):
    """einops.rearrange of the ranks' mesh, without tensor and expert parallelism."""
    if pattern.endswith("-> ep dp_cp tp"):
        return mesh.view(1, -1, 1)
    return mesh.view(1, -1) if pattern.endswith("(ep tp) dp_cp") else mesh.view(-1, 1)


def rearranged() -> dict[str, Any]:
    """A mixture of experts: losses, gradient norms and the first step's gradients, plain and with
    each of VARIATIONS."""
    import torch
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
        PipelineOffloadManager,
    )

    from support import tiny
    from support.offload_host import replacements
    from support.tiny import Layout, Tiny, make_config

    for replaced in replacements():
        setattr(*replaced)
    tiny.BATCH = 6
    layout = Layout(dp=2, ep=2)
    layout.initialize()
    found: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for name, settings in {"plain": {}, **VARIATIONS}.items():
        torch.manual_seed(1)
        later = {k: v for k, v in settings.items() if "recompute" not in k}
        config = make_config(
            layout,
            **VARIANTS["MLRA-4"],
            **EXPERTS,
            **{k: v for k, v in settings.items() if k not in later},
            output_gate=True,
            zero_init_output=False,
        )
        for setting, value in later.items():
            # Megatron's config takes it with 16-bit weights alone; its schedule knows no dtype.
            setattr(config, setting, value)
        model = Tiny.build(config, layout)
        steps = [model.step(seed) for seed in range(2)]
        if settings is OFFLOAD:
            manager = PipelineOffloadManager.get_instance()
            found["offloaded"] = manager.offload_summary_bytes
        plain = plain or steps[0]["gradients"]
        worst = max(
            float((g - plain[n]).abs().max() / plain[n].abs().max())
            for n, g in steps[0]["gradients"].items()
        )
        found[name] = {"steps": [[s["loss"], s["grad_norm"]] for s in steps], "gradients": worst}
    return found


def offloaded(name: str) -> dict[str, Any]:
    """Of a layout: steps and how far the first step's gradients are from those without offloading,
    to the bit."""
    import torch

    from support.offload_host import replacements
    from support.tiny import Layout, Tiny, make_config

    for replaced in replacements():
        setattr(*replaced)
    sizes, settings = LAYOUTS[name]
    layout = Layout(**sizes)
    layout.initialize()
    steps = []
    for offload in ({}, OFFLOAD):
        torch.manual_seed(1)
        options = {**VARIANTS["MLRA-4"], **settings, **offload, "output_gate": True}
        tiny = Tiny.build(make_config(layout, **options, zero_init_output=False), layout)
        steps.append([tiny.step(seed) for seed in range(2)])
    plain, found = (each[0]["gradients"] for each in steps)
    return {
        "plain": [[s["loss"], s["grad_norm"]] for s in steps[0]],
        "offloading": [[s["loss"], s["grad_norm"]] for s in steps[1]],
        "differing": [n for n, g in plain.items() if not torch.equal(found[n], g)],
    }


def _step(tiny, seed: int) -> list[float]:
    for chunk in tiny.chunks:
        chunk.zero_grad_buffer()
    tiny.optimizer.zero_grad()
    loss = tiny._run(seed, forward_only=False)
    _, norm, _ = tiny.optimizer.step()
    return [loss, float(norm)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
