"""Measure the memory of a small real model, to compare the planner's estimate with.

Usage: python -m support.drivers.memory FOLDER. Writes one JSON per case with bytes: saved for
backward at the end of the forward (unique storages without parameters), sent over the context
parallel group, of optimizer state, of weights, and of gradient buffers.
"""

from __future__ import annotations

import contextlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_mlra.training.cpu_backend import enable_cpu_backend

enable_cpu_backend()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import mpu  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402

from megatron_mlra.layers import attention  # noqa: E402
from megatron_mlra.layers.specs import block_spec  # noqa: E402
from megatron_mlra.training import hooks  # noqa: E402
from support.tiny import Layout, make_config  # noqa: E402
from support.world import run_world  # noqa: E402

MODEL = {
    "num_layers": 3,
    "hidden_size": 256,
    "ffn_hidden_size": 704,
    "num_attention_heads": 8,
}
LATENT = {
    "q_lora_rank": 96,
    "kv_lora_rank": 128,
    "qk_head_dim": 32,
    "qk_pos_emb_head_dim": 16,
    "v_head_dim": 32,
    "num_latent_heads": 4,
    "num_branches": 4,
}
GQA = {"attention": "gqa", "kv_channels": 32, "num_query_groups": 2}
VOCAB, SEQ, BATCH = 512, 128, 2
MLA = {"num_latent_heads": 1, "num_branches": 1}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SELECTIVE = {"recompute_granularity": "selective"}

CASES: dict[str, tuple[Layout, dict[str, Any]]] = {
    "mlra4": (Layout(), {}),
    "mlra4_query_kept": (Layout(), {"recompute_absorbed_query": False}),
    "mlra4_fp32": (Layout(), {"bf16": False}),
    "mlra4_materialized": (Layout(), {"core_form": "materialized"}),
    "mlra4_gated": (Layout(), {"output_gate": True, "query_head_norm": True}),
    "mlra4_core": (Layout(), SELECTIVE | {"recompute_modules": ["core_attn"]}),
    "mlra4_up_proj": (Layout(), SELECTIVE | {"recompute_modules": ["mla_up_proj"]}),
    "mlra4_both": (Layout(), SELECTIVE | {"recompute_modules": ["core_attn", "mla_up_proj"]}),
    "mlra4_full": (Layout(), FULL),
    "mla": (Layout(), MLA),
    "gqa": (Layout(), GQA),
    "mlra4_tp2": (Layout(tp=2), {"sequence_parallel": True}),
    "mlra4_tp2_latent": (Layout(tp=2), {"sequence_parallel": True, "latent_tp_layout": "latent"}),
    "mlra4_cp2": (Layout(cp=2), {}),
    "mlra4_materialized_cp2": (Layout(cp=2), {"core_form": "materialized"}),
    "mlra4_full_cp2": (Layout(cp=2), FULL),
    "mlra4_tp2_cp2": (Layout(tp=2, cp=2), {"sequence_parallel": True}),
    "mlra4_dp2": (Layout(dp=2, distributed_optimizer=True), {}),
}


def measure(layout: Layout, overrides: dict[str, Any]) -> dict[str, int]:
    """Bytes on this rank."""
    layout.initialize()
    overrides = {"bf16": True} | overrides
    dtype = torch.bfloat16 if overrides["bf16"] else torch.float32
    sizes = MODEL | ({} if overrides.get("attention") == "gqa" else LATENT)
    config = make_config(layout, **sizes | {"params_dtype": dtype} | overrides)
    model = GPTModel(
        config,
        block_spec(config),
        VOCAB,
        SEQ,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    )
    distributed = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=layout.distributed_optimizer
    )
    wrapped = DistributedDataParallel(config, distributed, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=1e-3,
            bf16=config.bf16,
            params_dtype=dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
        ),
        [wrapped],
    )
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    @contextlib.contextmanager
    def rebuilt_in_backward(query: torch.Tensor, rebuild, group):
        # The module's own hooks would hide what the core saves from those below.
        weights.add(query.untyped_storage().data_ptr())
        kept.append(query)
        yield

    kept: list[torch.Tensor] = []
    attention.rebuilt_in_backward = rebuilt_in_backward
    own = SEQ // layout.cp
    tokens = torch.randint(VOCAB, (BATCH, own))
    sent = count_context_traffic()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = wrapped(tokens, torch.arange(own).expand(BATCH, own), None, labels=tokens)
    activations = sum(t.untyped_storage().nbytes() for t in saved.values())
    saved.clear()
    loss.sum().backward()
    optimizer.step()
    return {
        "activations": activations,
        "context": sum(sent),
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(b.grad_data.nbytes for b in wrapped.buffers),
        "optimizer": optimizer_bytes(optimizer, weights),
    }


def count_context_traffic() -> list[float]:
    """Count the bytes that this rank sends over its context parallel group, per collective; a ring
    sends (cp - 1) / cp of the whole."""
    context, sent = mpu.get_context_parallel_group(), []

    def counted(collective, whole):
        def run(output, source, *rest, group=None, **named):
            if group is context:
                share = (group.size() - 1) / group.size()
                sent.append(share * whole(output, source).nbytes)
            return collective(output, source, *rest, group=group, **named)

        return run

    dist.all_gather_into_tensor = counted(dist.all_gather_into_tensor, lambda out, _: out)
    dist.reduce_scatter_tensor = counted(dist.reduce_scatter_tensor, lambda _, source: source)
    return sent


def optimizer_bytes(optimizer, weights: set[int]) -> int:
    """Bytes of Adam's moments, and of float32 main weights where the model's weights are not
    float32."""
    kept: dict[int, int] = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = part.optimizer
        states = [t for state in adam.state.values() for t in state.values()]
        main = [p for group in adam.param_groups for p in group["params"]]
        for t in (*states, *main):
            if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in weights:
                kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
    return sum(kept.values())


def main(folder: Path) -> None:
    hooks.apply(hooks.TORCH_ADAMW, hooks.Run(Namespace()))
    for name, (layout, overrides) in CASES.items():

        def work(rank: int, layout=layout, overrides=overrides, name=name) -> None:
            figures = measure(layout, overrides)
            (folder / f"{name}-{rank}.json").write_text(json.dumps(figures))

        run_world(layout.world, work, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
