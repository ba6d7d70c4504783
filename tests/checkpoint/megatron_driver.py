"""Save tiny models of every variant as Megatron does at TP2, beside their logits.

Usage: megatron_driver.py FOLDER
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

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


def main(folder: Path) -> None:
    import megatron_mlra.layer_specs  # noqa: F401  (loaded once, before the forks)
    from megatron_mlra.cpu_backend import enable_cpu_backend
    from world import run_world

    enable_cpu_backend()
    logging.disable(logging.WARNING)
    run_world(2, lambda rank: _save(folder, rank), folder / "world")


def _save(folder: Path, rank: int) -> None:
    import torch
    from megatron.core import dist_checkpointing

    from tiny import Layout, Tiny, make_config, save_logits

    layout = Layout(tp=2)
    layout.initialize()
    for name, model in MODELS.items():
        config = make_config(layout, zero_init_output=False, init_method_std=0.2, **model)
        tiny = Tiny.build(config, layout)
        with torch.no_grad():
            for key, weight in tiny.chunks[0].module.named_parameters():
                if "norm" in key:  # ones until trained
                    weight += 0.3 * torch.randn(weight.shape)
        tiny.load(tiny.collect("weight"))  # ranks agree on what they share
        path = folder / name
        if rank == 0:
            path.mkdir()
        torch.distributed.barrier()
        state = tiny.sharded_weights() | {"args": _arguments(config), "iteration": 7}
        dist_checkpointing.save(state, str(path))
        save_logits(tiny, folder / f"{name}.logits.pt")


def _arguments(config: Any) -> Any:
    """What the trainer would have saved of its command line."""
    import argparse

    import torch

    from tiny import SEQ, VOCAB

    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "rotary_base")
    names += ("layernorm_epsilon", "normalization", "q_lora_rank", "num_query_groups")
    names += ("kv_channels", "attention_output_gate", "add_bias_linear")
    names += ("num_latent_heads", "num_branches", "kv_lora_rank", "qk_head_dim")
    names += ("qk_pos_emb_head_dim", "v_head_dim", "output_gate", "variance_scaling")
    values = {name: getattr(config, name) for name in names if hasattr(config, name)}
    is_latent = "kv_lora_rank" in values
    values |= {"attention": "mlra" if is_latent else "gqa", "swiglu": True}
    values |= {"group_query_attention": not is_latent, "vocab_size": VOCAB}
    values |= {"padded_vocab_size": VOCAB, "max_position_embeddings": SEQ}
    return argparse.Namespace(**values, params_dtype=torch.float32)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
