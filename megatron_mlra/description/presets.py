"""YAML presets: where they lie, their values and bases, the model they describe. No Megatron.

A preset is named, like `mlra4_2.9b`, where it is one of the package's, or given by its path.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_mlra.command_line.foreign_text import read_yaml
from megatron_mlra.command_line.suggest import did_you_mean
from megatron_mlra.description.megatron_args import check_convertible, from_megatron_args
from megatron_mlra.description.model import ModelDescription

ALIASES = {"qk_nope_head_dim": "qk_head_dim", "qk_rope_head_dim": "qk_pos_emb_head_dim"}
"""Flags whose argparse destination has another name."""

FOLDER = Path(__file__).resolve().parents[1] / "presets"
"""Where the presets of the package lie; the bases that are no models by themselves are below it."""
KEYS = FOLDER / "keys.txt"
"""The keys that a preset may have, as `python -m megatron_mlra.training.presets` lists them: what
prices a run knows no Megatron, and must not price another one for a misspelt key."""
_TITLE = re.compile(r"# (.+?)\n")
_COUNT = re.compile(r": ([\d,]+) parameters\.$")


def preset_names() -> list[str]:
    """The names of the package's presets."""
    return sorted(path.name.removesuffix(".yaml") for path in FOLDER.glob("*.yaml"))


def preset_name(preset: str | Path) -> str:
    """What a preset given by name or path is called: `mlra4_2.9b`."""
    return Path(preset).name.removesuffix(".yaml")


def find_preset(preset: str | Path, beside: Path | None = None) -> Path:
    """The file of a preset that is given by a path, or by the name of one of the package's.

    Args:
        preset: a path, a name (`debug`), or that of a base (`recipes/paper_recipe`).
        beside: folder that a path starts from; default: the working directory.

    Returns:
        a file; where there is none, the path that was given, for a message to name.
    """
    path = Path(preset) if beside is None else beside / preset
    files = FOLDER.rglob("*.yaml")
    ours = {file.relative_to(FOLDER).as_posix().removesuffix(".yaml"): file for file in files}
    if str(preset) in ours:
        return ours[str(preset)]
    return path if path.is_file() else ours.get(str(preset).removesuffix(".yaml"), path)


def preset_list() -> str:
    """The package's presets, a line each: name, parameters, what it is."""
    rows = []
    for name in preset_names():
        title = _TITLE.match((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))[1]
        count = int(_COUNT.search(title)[1].replace(",", ""))
        size = f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
        rows.append((name, size, _COUNT.sub("", title)))
    width = max(len(name) for name, *_ in rows)
    return "\n".join(f"{name:{width}}  {size:>6}  {about}" for name, size, about in rows)


def preset_values(path: str | Path) -> dict[str, Any]:
    """The values of a preset and its bases, by argparse destination, without a parser to check
    them: for what needs no Megatron.

    Raises:
        ValueError: for a missing file, bad YAML, an unknown key or a base that leads back.
    """
    merged: dict[str, Any] = {}
    known = KEYS.read_text(encoding="utf-8").split()
    for file, values in preset_chain(path):
        refuse_unknown(file, values, known)
        merged |= {ALIASES.get(key, key): value for key, value in values.items()}
    for key in ("moe_layer_freq", "no_rope_freq"):
        if isinstance(merged.get(key), str):
            merged[key] = _layer_pattern(key, merged[key])
    return merged


def refuse_unknown(file: Path, values: Collection[str], known: Collection[str]) -> None:
    """Refuse a preset's keys that are none.

    Raises:
        ValueError: names the first, and the nearest known one.
    """
    for key in values:
        if key not in known:
            raise ValueError(f"--config {file}: unknown key {key!r}{did_you_mean(str(key), known)}")


def preset_chain(path: str | Path) -> list[tuple[Path, dict[str, Any]]]:
    """A preset and its bases with their own values, each behind the ones it overrides.

    A base is a path from the file that names it, or the name of one of the package's presets.
    """
    path = find_preset(path)
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
        path = find_preset(base, path.parent)


def _layer_pattern(key: str, text: str) -> list[int] | int:
    """Megatron's pattern of layers, e.g. `([0]+[1]*26)`, or a plain number."""
    if text.isdigit():
        return int(text)
    pattern: list[int] = []
    for term in text.strip("() ").split("+"):
        found = re.fullmatch(r"\s*\[([01](?:\s*,\s*[01])*)\]\s*(?:\*\s*(\d+))?\s*", term)
        if not found:
            raise ValueError(f"{key} is {text!r}; use a form such as ([0]+[1]*26)")
        pattern += [int(bit) for bit in found[1].split(",")] * int(found[2] or 1)
    return pattern


def _read(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise ValueError(f"--config {path}: {_missing(path)}") from None
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected lines of `key: value`, found {values!r:.60}")
    return values


def _missing(path: Path) -> str:
    """Why there is no such preset, and the nearest that there is."""
    name = preset_name(path)
    if name in preset_names():
        return f"no such file; the preset of this name is --config {name}"
    if path.parent == Path() and path.suffix != ".yaml":
        near = did_you_mean(name, preset_names())
        return f"no preset of this name, and no file{near or '; mlra presets lists them'}"
    siblings = [str(p) for p in path.parent.glob("*.yaml")]
    return f"no such file{did_you_mean(str(path), siblings)}"


def preset_description(path: str | Path) -> ModelDescription:
    """The model of a YAML preset (its own keys over those of its `base`), in bfloat16.

    Raises:
        ValueError: the file is missing, or describes no model of this package.
    """
    values = preset_values(path)
    if values.get("attention") not in ("mlra", "gqa"):
        found = values.get("attention")
        raise ValueError(f"{path} has attention {found!r}; use one of mlra or gqa")
    values |= {"layernorm_epsilon": values.get("norm_epsilon", 1e-5)}
    check_convertible(values)
    return from_megatron_args(values, dtype="bfloat16")
