"""Multi-Head Low-Rank Attention (MLRA) for Megatron-core.

The public names below are imported when they are first used, so that a tool that needs no torch
loads none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megatron_mlra.version import __version__

if TYPE_CHECKING:
    from megatron_mlra.checkpoint.formats import open_checkpoint
    from megatron_mlra.description.model import ModelDescription
    from megatron_mlra.inference.engine import Engine
    from megatron_mlra.inference.load import load_model
    from megatron_mlra.layers.config import MLRAConfig
    from megatron_mlra.layers.specs import block_spec

__all__ = [
    "Engine",
    "MLRAConfig",
    "ModelDescription",
    "__version__",
    "block_spec",
    "load_model",
    "open_checkpoint",
]

_HOMES = {
    "Engine": "megatron_mlra.inference.engine",
    "MLRAConfig": "megatron_mlra.layers.config",
    "ModelDescription": "megatron_mlra.description.model",
    "block_spec": "megatron_mlra.layers.specs",
    "load_model": "megatron_mlra.inference.load",
    "open_checkpoint": "megatron_mlra.checkpoint.formats",
}


def __getattr__(name: str) -> Any:
    """The public name, from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
