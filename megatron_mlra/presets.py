"""YAML presets: files whose values become defaults of the command line's flags."""

from __future__ import annotations

import argparse
import difflib
import re
from pathlib import Path
from typing import Any

import yaml

ALIASES = {"qk_nope_head_dim": "qk_head_dim", "qk_rope_head_dim": "qk_pos_emb_head_dim"}
"""Flags whose argparse destination has another name."""


def load_preset(path: str | Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read a YAML preset into argparse defaults.

    Keys are flags without dashes in front and with underscores, or their argparse destinations;
    `base` names another preset, relative to this one, whose values this one overrides.

    Raises:
        ValueError: for a missing file, bad YAML, an unknown key (names the nearest known one) or a
            value the flag would refuse.
    """
    known = _names(parser)
    defaults: dict[str, Any] = {}
    for file, values in preset_chain(Path(path)):
        for key, value in values.items():
            if key not in known:
                raise ValueError(
                    f"--config {file}: unknown key {key!r}{did_you_mean(str(key), known)}"
                )
            action, by_flag = known[key]
            defaults[action.dest] = _value(f"--config {file}: {key}", value, action, by_flag)
    return defaults


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


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice, of which PyYAML takes the last, is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]} is given twice; leave one")
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        siblings = [str(p) for p in path.parent.glob("*.yaml")]
        raise ValueError(
            f"--config {path}: no such file{did_you_mean(str(path), siblings)}"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected lines of `key: value`, found {values!r:.60}")
    return values


def did_you_mean(name: str, known) -> str:
    """'; did you mean X?' for the known name nearest to `name`, '' where none is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def _value(where: str, value: Any, action: argparse.Action, by_flag: bool) -> Any:
    """`value` of a preset as the parser would have stored it."""
    if isinstance(action, argparse._StoreTrueAction | argparse._StoreFalseAction):
        if not isinstance(value, bool):
            raise ValueError(f"{where} is {value!r}; use true or false")
        on = isinstance(action, argparse._StoreTrueAction)
        return value == on if by_flag else value
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError(f"{where} is {value!r}; use true or false")
        return value
    if value is None:
        return None
    takes_list = action.nargs in ("*", "+") or isinstance(action.nargs, int)
    if isinstance(value, list) and takes_list:
        return [_scalar(where, item, action) for item in value]
    if takes_list:
        # As on a command line: `data_path: 0.3 data/a 0.7 data/b`.
        words = value.split() if isinstance(value, str) else [value]
        return [_scalar(where, word, action) for word in words]
    return _scalar(where, value, action)


def _scalar(where: str, value: Any, action: argparse.Action) -> Any:
    if isinstance(value, bool) and action.type is bool:
        return value
    kind = getattr(action.type, "__name__", "text")
    # Megatron's own types read lists from text, as YAML may have done already.
    plain = action.type in (int, float, str, None)
    if isinstance(value, bool | dict) or (isinstance(value, list) and plain):
        raise ValueError(f"{where} is {value!r}, not a valid {kind}")
    try:
        converted = action.type(str(value)) if action.type else value
    except (TypeError, ValueError, KeyError, argparse.ArgumentTypeError):
        raise ValueError(f"{where} is {value!r}, not a valid {kind}") from None
    if action.choices is not None and converted not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise ValueError(f"{where} is {value!r}; use one of {choices}")
    return converted


def add_opposites(parser: argparse.ArgumentParser) -> None:
    """Give each switch, which could only be left out, a hidden opposite: a command line turns off
    what a preset turned on, by `--no-bf16` for `--bf16`, `--rope-fusion` for `--no-rope-fusion`."""
    known = parser._option_string_actions
    for action in list(parser._actions):
        if not isinstance(action, argparse._StoreTrueAction | argparse._StoreFalseAction):
            continue
        opposites = [
            f"--{name[5:]}" if name.startswith("--no-") else f"--no-{name[2:]}"
            for name in action.option_strings
            if name.startswith("--")
        ]
        if free := [name for name in opposites if name not in known]:
            parser.add_argument(
                *free,
                dest=action.dest,
                action="store_false" if action.const else "store_true",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )


def _names(parser: argparse.ArgumentParser) -> dict[str, tuple[argparse.Action, bool]]:
    """Every key a preset may use -> (action, whether the key is the flag's own name)."""
    names: dict[str, tuple[argparse.Action, bool]] = {}
    for action in parser._actions:
        names.setdefault(action.dest, (action, False))
    for action in parser._actions:
        for option in action.option_strings:
            names[option.lstrip("-").replace("-", "_")] = (action, True)
    for name in ("config", "help", "h"):
        names.pop(name, None)
    return names
