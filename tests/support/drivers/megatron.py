"""Save tiny models of every variant by Megatron at TP2, and mixtures of experts also at EP2, with
their logits.

Usage: python -m support.drivers.megatron FOLDER
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

LATENT = {"v_head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "MLA": {"num_latent_heads": 1, "num_branches": 1, **LATENT},
    "GLA-2": {"num_latent_heads": 2, "num_branches": 1, **LATENT},
    "GLA-4": {"num_latent_heads": 4, "num_branches": 1, **LATENT},
    "MLRA-2": {"num_latent_heads": 4, "num_branches": 2, **LATENT},
    "MLRA-4": {"num_latent_heads": 4, "num_branches": 4, **LATENT},
    "MLRA-4 gated": {"num_latent_heads": 4, "num_branches": 4, "output_gate": True, **LATENT},
    "MHA": {"attention": "gqa", "num_query_groups": 8},
    "MQA": {"attention": "gqa", "num_query_groups": 1},
    "GQA": {"attention": "gqa", "num_query_groups": 2},
    "GQA gated": {"attention": "gqa", "num_query_groups": 2, "attention_output_gate": True},
}
EXPERTS = {
    "num_moe_experts": 6,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}
MOE_MODELS: dict[str, dict[str, Any]] = {
    # As the preset routes: one dense layer, softmax before top-k, shared experts.
    "MLRA-4 MoE": {
        "num_latent_heads": 4,
        "num_branches": 4,
        "num_layers": 3,
        "moe_layer_freq": [0, 1, 1],
        "moe_router_pre_softmax": True,
        "moe_shared_expert_intermediate_size": 40,
    },
    "MLA MoE": {
        "num_latent_heads": 1,
        "num_branches": 1,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_dtype": "fp32",
    },
    "GQA MoE": {
        "attention": "gqa",
        "num_query_groups": 2,
        "moe_layer_freq": 2,
        "moe_shared_expert_intermediate_size": 40,
    },
}
MOE_LAYOUTS: dict[str, dict[str, int]] = {"tp2": {"tp": 2}, "ep2": {"dp": 2, "ep": 2}}


def main(folder: Path) -> None:
    import megatron_mlra.layers.specs  # noqa: F401  (loaded once, before the forks)
    from megatron_mlra.training.cpu_backend import enable_cpu_backend
    from support.world import run_world

    enable_cpu_backend()
    logging.disable(logging.WARNING)
    run_world(2, lambda rank: _save(folder, rank, {"tp": 2}, MODELS), folder / "world")
    for name, layout in MOE_LAYOUTS.items():
        models = {
            f"{model} {name}": {**EXPERTS, **sizes, "sequence_parallel": "tp" in layout}
            for model, sizes in MOE_MODELS.items()
        }
        work = partial(_save, folder, layout=layout, models=models)
        run_world(2, lambda rank, work=work: work(rank), folder / f"world-{name}")


def _save(folder: Path, rank: int, layout: dict[str, int], models: dict[str, Any]) -> None:
    import torch
    from megatron.core import dist_checkpointing

    from support.tiny import Layout, Tiny, make_config, save_logits

    layout = Layout(**layout)
    layout.initialize()
    for name, model in models.items():
        config = make_config(layout, zero_init_output=False, init_method_std=0.2, **model)
        tiny = Tiny.build(config, layout)
        module = tiny.chunks[0].module
        with torch.no_grad():
            for key, weight in module.named_parameters():
                if "norm" in key:  # ones until trained
                    weight += 0.3 * torch.randn(weight.shape)
            for key, bias in module.named_buffers():
                if "expert_bias" in key:  # zeros until trained
                    bias += torch.linspace(-0.2, 0.2, bias.numel())
        tiny.load(tiny.collect("weight"))  # ranks agree on what they share
        path = folder / name
        if rank == 0:
            path.mkdir()
        torch.distributed.barrier()
        state = tiny.sharded_weights() | {"args": _arguments(config), "iteration": 7}
        dist_checkpointing.save(state, str(path))
        save_logits(tiny, folder / f"{name}.logits.pt")


def _arguments(config: Any) -> Any:
    """The arguments that the trainer would have saved."""
    import argparse

    import torch

    from support.samples import SEQ, VOCAB

    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "rotary_base")
    names += ("layernorm_epsilon", "normalization", "q_lora_rank", "num_query_groups")
    names += ("kv_channels", "attention_output_gate", "add_bias_linear")
    names += ("num_latent_heads", "num_branches", "kv_lora_rank", "qk_head_dim")
    names += ("qk_pos_emb_head_dim", "v_head_dim", "output_gate", "variance_scaling")
    names += tuple(name for name in vars(config) if name.startswith("moe_"))
    values = {name: getattr(config, name) for name in names if hasattr(config, name)}
    is_latent = "kv_lora_rank" in values
    values |= {"attention": "mlra" if is_latent else "gqa", "swiglu": True}
    values |= {"group_query_attention": not is_latent, "vocab_size": VOCAB}
    values |= {"padded_vocab_size": VOCAB, "max_position_embeddings": SEQ}
    values |= {"num_experts": config.num_moe_experts, "params_dtype": torch.float32}
    return argparse.Namespace(**values)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
