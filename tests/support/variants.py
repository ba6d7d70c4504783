"""The variants that the distributed tests train, and the layouts that each supports. Imports
nothing."""

from __future__ import annotations

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "MLA": {"num_latent_heads": 1, "num_branches": 1},
    "GLA-2": {"num_latent_heads": 2, "num_branches": 1},
    "MLRA-2": {"num_latent_heads": 4, "num_branches": 2},
    "MLRA-4": {"num_latent_heads": 4, "num_branches": 4},
}


def fits(variant: dict[str, int], tp: int, layout: str) -> bool:
    """Whether a variant supports this layout with `tp` ranks; the config refuses all others."""
    branches = variant["num_branches"]
    unit = variant["num_latent_heads"] // branches if layout == "head" else branches
    return unit % tp == 0 or tp % unit == 0
