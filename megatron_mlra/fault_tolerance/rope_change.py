"""Changes of RoPE and sequence lengths between a checkpoint and the run that loads it.

To train a longer context, weights are loaded under another RoPE. Only the arguments tell one RoPE
from another, so that a change counts as intended only if a flag on the command line asks for it.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_mlra.command_line.parser import flag
from megatron_mlra.description.model import YARN

_DEFAULTS = {
    "rotary_scaling_factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
"""Defaults of Megatron's configuration, for checkpoints whose arguments lack these."""

_FLAGS = {
    "original_max_position_embeddings": "--yarn-original-max-position-embeddings",
    "beta_fast": "--yarn-beta-fast",
    "beta_slow": "--yarn-beta-slow",
}

BY_PRESET = " by the preset"
"""End of the text of a change that no flag asks for."""

_LENGTHS = {"seq_length": "sequence length", "max_position_embeddings": "positions"}


def changes(saved: Namespace, args: Namespace, given: set[str]) -> tuple[list[str], list[str]]:
    """Differences in RoPE and lengths.

    Args:
        saved: arguments of the checkpoint.
        args: those of this run.
        given: flags on this run's command line.

    Returns:
        Texts of the changes that flags ask for, or for lengths the preset, and of the other
        differences, each with the flags that resolve the difference.
    """
    asked, not_asked = [], []
    there, here = _rope(saved), _rope(args)
    for name in dict.fromkeys((*there, *here)):
        old, new, option = there.get(name), here.get(name), _FLAGS.get(name, flag(name))
        if old == new:
            continue
        # A change of type adds or removes YaRN's numbers.
        by_type = "--rope-type" in given and None in (old, new)
        if option in given or by_type:
            if new is not None:
                before = f"{_text(old)} -> " if old is not None else ""
                asked.append(f"{name.replace('_', ' ')} {before}{_text(new)}")
        elif old is not None:
            fix = f"{option} {_text(old)} goes on with it"
            if new is not None:
                fix += f", {option} {_text(new)} changes it"
            not_asked.append(f"{name} is {_text(old)} there, {_text(new)} here ({fix})")
    for name, title in _LENGTHS.items():
        old, new = getattr(saved, name, None), getattr(args, name, None)
        if None not in (old, new) and old != new:
            by = "" if flag(name) in given else BY_PRESET
            asked.append(f"{title} {old:,} -> {new:,}{by}")
    return asked, not_asked


def _rope(args: Namespace) -> dict[str, Any]:
    """The arguments that determine the RoPE tables."""
    found = {
        "rotary_base": getattr(args, "rotary_base", 10000),
        "rope_type": getattr(args, "rope_type", None) or "rope",
    }
    if found["rope_type"] == "yarn":
        for name in YARN:
            value = getattr(args, name, None)
            found[name] = _DEFAULTS[name] if value is None else value
    return found


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
