"""YAML presets: their values and bases, and the model they describe. Needs no Megatron."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_mlra.command_line.foreign_text import read_yaml
from megatron_mlra.command_line.parser import did_you_mean
from megatron_mlra.description.megatron_args import check_convertible, from_megatron_args
from megatron_mlra.description.model import ModelDescription

ALIASES = {"qk_nope_head_dim": "qk_head_dim", "qk_rope_head_dim": "qk_pos_emb_head_dim"}
"""Flags whose argparse destination has another name."""


def preset_values(path: str | Path) -> dict[str, Any]:
    """The values of a preset and its bases, by argparse destination, without a parser to check
    them: for what needs no Megatron.

    Raises:
        ValueError: for a missing file, bad YAML or a base that leads back.
    """
    merged: dict[str, Any] = {}
    for _, values in preset_chain(Path(path)):
        merged |= {ALIASES.get(key, key): value for key, value in values.items()}
    if isinstance(merged.get("moe_layer_freq"), str):
        merged["moe_layer_freq"] = _layer_pattern(merged["moe_layer_freq"])
    return merged


def preset_chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A preset and its bases with their own values, each behind the ones it overrides."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    while True:
        if any(path.resolve() == above.resolve() for above, _ in chain):
            raise ValueError(f"--config {path}: base leads back to this file; remove it")
        values = _read(path)
        base = values.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise ValueError(f"--config {path}: base is {base!r}; use the name of another preset")
        chain.insert(0, (path, values))
        if base is None:
            return chain
        path = path.parent / base


def _layer_pattern(text: str) -> list[int] | int:
    """Megatron's pattern of layers, e.g. `([0]+[1]*26)`, or a plain number."""
    if text.isdigit():
        return int(text)
    pattern: list[int] = []
    for term in text.strip("() ").split("+"):
        found = re.fullmatch(r"\s*\[([01](?:\s*,\s*[01])*)\]\s*(?:\*\s*(\d+))?\s*", term)
        if not found:
            raise ValueError(f"moe_layer_freq is {text!r}; use a form such as ([0]+[1]*26)")
        pattern += [int(bit) for bit in found[1].split(",")] * int(found[2] or 1)
    return pattern


def _read(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        siblings = [str(p) for p in path.parent.glob("*.yaml")]
        raise ValueError(
            f"--config {path}: no such file{did_you_mean(str(path), siblings)}"
        ) from None
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected lines of `key: value`, found {values!r:.60}")
    return values


def preset_description(path: str | Path) -> ModelDescription:
    """The model of a YAML preset (its own keys over those of its `base`), in bfloat16.

    Raises:
        ValueError: the file is missing, or describes no model of this package.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; use one of examples/configs/*.yaml")
    values = preset_values(path)
    if values.get("attention") not in ("mlra", "gqa"):
        found = values.get("attention")
        raise ValueError(f"{path} has attention {found!r}; use one of mlra or gqa")
    values |= {"layernorm_epsilon": values.get("norm_epsilon", 1e-5)}
    check_convertible(values)
    return from_megatron_args(values, dtype="bfloat16")
