"""Save a tiny model in one layout, load it in others, and compare logits: one JSON per case.

Usage: python -m support.drivers.checkpoint FOLDER
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from support.variants import VARIANTS

SAVED = {"tp": 2, "latent_tp_layout": "head"}
LOADED: dict[str, dict[str, Any]] = {
    "tp1": {"tp": 1},
    "tp2-latent": {"tp": 2, "latent_tp_layout": "latent"},
    "tp4-latent": {"tp": 4, "latent_tp_layout": "latent"},
    "tp4-head": {"tp": 4, "latent_tp_layout": "head"},
    "tp8-latent": {"tp": 8, "latent_tp_layout": "latent"},
    "pp2": {"pp": 2},
    "tp1-materialized": {"tp": 1, "core_form": "materialized"},
}
MODELS = {
    "MLRA-4": VARIANTS["MLRA-4"],
    "MLRA-2": VARIANTS["MLRA-2"],
    "MLA": VARIANTS["MLA"],
    "MLRA-4-gated": {**VARIANTS["MLRA-4"], "output_gate": True, "query_head_norm": True},
    "MLRA-4-NoPE": {**VARIANTS["MLRA-4"], "qk_pos_emb_head_dim": 0},
}


def main(folder: Path) -> None:
    import megatron_mlra.layers.specs  # noqa: F401  (loaded once, before the forks)
    from megatron_mlra.training.cpu_backend import enable_cpu_backend
    from support.world import run_world

    enable_cpu_backend()
    logging.disable(logging.WARNING)
    run_world(2, lambda rank: _save(folder), folder / "world-save")
    for name, target in LOADED.items():
        size = target.get("tp", 1) * target.get("pp", 1)
        run_world(size, lambda rank, n=name: _load(folder, n, rank), folder / f"world-{name}")


def _build(target: dict[str, Any], model: dict[str, Any], std: float):
    from support.tiny import Layout, Tiny, make_config

    target = dict(target)
    layout = Layout(**{k: target.pop(k) for k in ("tp", "pp") if k in target})
    if not _initialized():
        layout.initialize()
    overrides = {**model, **target, "zero_init_output": False, "init_method_std": std}
    return Tiny.build(make_config(layout, **overrides), layout)


def _initialized() -> bool:
    from megatron.core import parallel_state

    return parallel_state.model_parallel_is_initialized()


def _save(folder: Path) -> None:
    import torch
    from megatron.core import dist_checkpointing

    from support.tensors import norms_drawn
    from support.tiny import save_logits

    for name, model in MODELS.items():
        tiny = _build(SAVED, model, std=0.2)
        tiny.load(norms_drawn(tiny.collect("weight")))
        path = folder / f"{name}.ckpt"
        if torch.distributed.get_rank() == 0:
            path.mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(tiny.sharded_weights(), str(path))
        save_logits(tiny, folder / f"{name}.logits.pt")


def _load(folder: Path, target: str, rank: int) -> None:
    import torch
    from megatron.core import dist_checkpointing

    from support.tiny import save_logits

    results = {}
    for name, model in MODELS.items():
        tiny = _build(LOADED[target], model, std=0.01)
        wanted = tiny.sharded_weights()
        loaded = dist_checkpointing.load(wanted, str(folder / f"{name}.ckpt"))
        tiny.chunks[0].module.load_state_dict(loaded, strict=True)
        path = folder / f"{name}.{target}.logits.pt"
        save_logits(tiny, path)
        torch.distributed.barrier()
        if rank == 0:
            expected, found = torch.load(folder / f"{name}.logits.pt"), torch.load(path)
            scale = float(expected.abs().max())
            results[name] = float((expected - found).abs().max()) / scale
    if rank == 0:
        (folder / f"{target}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
