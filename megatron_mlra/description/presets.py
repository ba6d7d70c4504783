"""YAML presets: their files, values and bases, and the model that one describes. No Megatron.

A preset of the package is given by its name, like `mlra4_2.9b`, any other by its path.
"""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_mlra.command_line.foreign_text import read_yaml
from megatron_mlra.command_line.suggest import did_you_mean
from megatron_mlra.description.layer_pattern import layer_pattern
from megatron_mlra.description.megatron_args import check_convertible, from_megatron_args
from megatron_mlra.description.model import ModelDescription

ALIASES = {"qk_nope_head_dim": "qk_head_dim", "qk_rope_head_dim": "qk_pos_emb_head_dim"}
"""Key of a preset -> argparse destination, if the names differ."""

FOLDER = Path(__file__).resolve().parents[1] / "presets"
"""Folder of the package's presets; its subfolders hold bases, which are no complete models."""
KEYS = FOLDER / "keys.txt"
"""File with the keys that a preset may have, as `python -m megatron_mlra.training.all_flags` lists
them. The planner, which does not import Megatron, must refuse a misspelt key too."""
_TITLE = re.compile(r"# (.+?)\n")
_COUNT = re.compile(r": ([\d,]+) parameters\.$")


def preset_names() -> list[str]:
    """The names of the package's presets."""
    return sorted(path.name.removesuffix(".yaml") for path in FOLDER.glob("*.yaml"))


def preset_name(preset: str | Path) -> str:
    """The name of a preset that is given by name or path: `mlra4_2.9b`."""
    return Path(preset).name.removesuffix(".yaml")


def find_preset(preset: str | Path, beside: Path | None = None) -> Path:
    """The file of a preset that is given by a path, or by the name of one of the package.

    Args:
        preset: a path, or the name of a preset (`debug`) or of a base (`recipes/paper_recipe`).
        beside: folder to which a path is relative; default: the working directory.

    Returns:
        The file; if there is none, the given path, for a message.
    """
    path = Path(preset) if beside is None else beside / preset
    files = FOLDER.rglob("*.yaml")
    ours = {file.relative_to(FOLDER).as_posix().removesuffix(".yaml"): file for file in files}
    if str(preset) in ours:
        return ours[str(preset)]
    return path if path.is_file() else ours.get(str(preset).removesuffix(".yaml"), path)


def a_preset(value: str | Path, flag: str) -> None:
    """The check of a parser's argument, see command_line/early.py: the preset can be read.

    Raises:
        ValueError: see `preset_values`.
    """
    try:
        preset_values(value)
    except ValueError as error:
        raise ValueError(re.sub("^--config", flag, str(error))) from None


def preset_list() -> str:
    """The package's presets, one per line: name, parameters, description."""
    rows = []
    for name in preset_names():
        title = _TITLE.match((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))[1]
        count = int(_COUNT.search(title)[1].replace(",", ""))
        size = f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
        rows.append((name, size, _COUNT.sub("", title)))
    width = max(len(name) for name, *_ in rows)
    return "\n".join(f"{name:{width}}  {size:>6}  {about}" for name, size, about in rows)


def preset_values(path: str | Path) -> dict[str, Any]:
    """Argparse destination -> value, of a preset and its bases, without what is `null`. Values are
    not checked, since that needs Megatron's parser.

    Raises:
        ValueError: a file is missing or bad YAML, a key is unknown, or the bases form a circle.
    """
    merged: dict[str, Any] = {}
    known = KEYS.read_text(encoding="utf-8").split()
    for file, values in preset_chain(path):
        refuse_unknown(file, values, known)
        merged |= {ALIASES.get(key, key): value for key, value in values.items()}
        merged = {key: value for key, value in merged.items() if value is not None}
    for key in ("moe_layer_freq", "no_rope_freq"):
        if isinstance(merged.get(key), str):
            try:
                merged[key] = layer_pattern(merged[key])
            except ArgumentTypeError as error:
                raise ValueError(f"--config {path}: {key}: {error}") from None
    return merged


def refuse_unknown(file: Path, values: Collection[str], known: Collection[str]) -> None:
    """Refuse unknown keys of a preset.

    Raises:
        ValueError: names the first unknown key, and a similar known one.
    """
    for key in values:
        if key not in known:
            raise ValueError(f"--config {file}: unknown key {key!r}{did_you_mean(str(key), known)}")


def preset_chain(path: str | Path) -> list[tuple[Path, dict[str, Any]]]:
    """(file, own values) of a preset and its bases; each file follows its base.

    A base is a path relative to the file that names it, or the name of a preset of the package.

    Raises:
        ValueError: a file is missing or bad YAML, or the bases form a circle.
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
    """The message on a missing preset, with the most similar existing one."""
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
        ValueError: see `preset_values`; or the preset describes no model that can be converted.
    """
    values = preset_values(path)
    if values.get("attention") not in ("mlra", "gqa"):
        found = values.get("attention")
        raise ValueError(f"{path} has attention {found!r}; use one of mlra or gqa")
    values |= {"layernorm_epsilon": values.get("norm_epsilon", 1e-5)}
    check_convertible(values)
    return from_megatron_args(values, dtype="bfloat16")
