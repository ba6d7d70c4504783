"""Take one step of Muon in several layouts from the same gradients: one file of updates per case.

Usage: python -m support.drivers.muon FOLDER [PATTERN]
"""

from __future__ import annotations

import fnmatch
import logging
import sys
import traceback
import zlib
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.drivers.parity import references

LAYOUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "MLRA-4 tp2 head": ("MLRA-4", {"tp": 2}, {"latent_tp_layout": "head"}),
    "MLRA-4 tp2 latent": ("MLRA-4", {"tp": 2}, {"latent_tp_layout": "latent"}),
    "MLRA-4 tp8 latent": ("MLRA-4", {"tp": 8}, {"latent_tp_layout": "latent"}),
    "MLRA-4 tp2 dp2": ("MLRA-4", {"tp": 2, "dp": 2}, {}),
    "MLRA-4 gated tp2": ("MLRA-4 gated", {"tp": 2}, {"sequence_parallel": True}),
    "MLRA-4 query norm tp2": ("MLRA-4 query norm", {"tp": 2}, {"latent_tp_layout": "latent"}),
    "MLRA-4 NoPE tp2": ("MLRA-4 NoPE", {"tp": 2}, {}),
    "MLA tp2": ("MLA", {"tp": 2}, {}),
    "GLA-2 tp4 latent": ("GLA-2", {"tp": 4}, {"latent_tp_layout": "latent"}),
    "MLRA-4 unscaled tp2": ("MLRA-4 unscaled, no q latent", {"tp": 2}, {}),
    "MLRA-4 MTP tp2": ("MLRA-4 MTP", {"tp": 2}, {"latent_tp_layout": "latent"}),
    "MLRA-4 MoE tp2": ("MLRA-4 MoE", {"tp": 2}, {"sequence_parallel": True}),
    "GQA tp2": ("GQA", {"tp": 2}, {}),
    # Two ranks share a group's key and value: a rank holds a part of the group's rows.
    "GQA tp8": ("GQA", {"tp": 8}, {}),
}
"""Case -> model, layout, further configuration."""


def gradient(name: str, shape: tuple[int, ...]):
    """The gradient of a global weight: the same in every layout."""
    import torch

    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=draw)


def main(folder: Path, pattern: str) -> None:
    import megatron_mlra.layers.specs  # noqa: F401  (loaded once, before the forks)
    from megatron_mlra.training import hooks
    from megatron_mlra.training.cpu_backend import enable_cpu_backend
    from support.world import run_world

    enable_cpu_backend()
    hooks.apply(hooks.MUON[:-3], hooks.Run(Namespace()))
    logging.disable(logging.WARNING)
    wanted = {name: case for name, case in LAYOUTS.items() if fnmatch.fnmatch(name, pattern)}
    models = {model for model, _, _ in wanted.values()}

    def one_rank(_rank: int) -> None:
        for i, model in enumerate(sorted(models)):
            Case(model, model, {}, {}).run(folder, again=i > 0)

    run_world(1, one_rank, folder / "world-1")
    for i, (name, (model, layout, config)) in enumerate(wanted.items()):
        case = Case(name, model, layout, config)
        size = layout.get("tp", 1) * layout.get("dp", 1)
        run_world(size, lambda rank, case=case: case.run(folder), folder / f"world-{i}-of-{size}")


@dataclass
class Case:
    """One model in one layout."""

    name: str
    model: str
    layout: dict[str, Any]
    config: dict[str, Any]

    def run(self, folder: Path, again: bool = False) -> None:
        """Take the step; write the updates and the optimizer's description of itself."""
        import torch

        from megatron_mlra.training import muon
        from support.tiny import Layout, Tiny, make_config

        layout = Layout(**self.layout, optimizer="muon")
        if not again:
            layout.initialize()
        tiny = Tiny.build(
            make_config(layout, **{**references()[self.model], **self.config}), layout
        )
        update = tiny.update(gradient)
        if torch.distributed.get_rank() == 0:
            told = muon.table("muon", tiny.chunks)
            torch.save({"update": update, "table": told}, folder / f"{self.name}.pt")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "*")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
