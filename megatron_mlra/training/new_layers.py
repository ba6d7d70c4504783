"""New layers of multi-token prediction in a run that starts from a checkpoint without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedBase

from megatron_mlra.training.hook import Run

_NEW = "mtp."
"""Prefix of the names of these layers in a checkpoint."""


def keep_new_layers(load: Callable, run: Run) -> Callable:
    """Wrap Megatron's `dist_checkpointing.load`, so that new layers keep their initial weights.

    With `Run.new_multi_token` the checkpoint has no such layers. Otherwise returns `load` itself.
    """
    if not run.new_multi_token:
        return load

    def load_rest(sharded_state_dict: dict[str, Any], *rest: Any, **named: Any) -> dict[str, Any]:
        new: dict[str, dict[str, Any]] = {}
        for chunk, entries in sharded_state_dict.items():
            if not chunk.startswith("model") or not isinstance(entries, dict):
                continue
            for name, entry in list(entries.items()):
                if isinstance(entry, ShardedBase) and entry.key.startswith(_NEW):
                    new.setdefault(chunk, {})[name] = entries.pop(name).data
        loaded = load(sharded_state_dict, *rest, **named)
        for chunk, entries in new.items():
            loaded.setdefault(chunk, {}).update(entries)
        return loaded

    return load_rest
