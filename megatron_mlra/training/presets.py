"""YAML presets: files whose values become defaults of the command line's flags."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_mlra.description.presets import preset_chain, refuse_unknown


def load_preset(path: str | Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read a YAML preset into argparse defaults.

    A key is a flag (without the leading dashes, with underscores for the others) or the flag's
    argparse destination. The key `base` names another preset, whose values this preset overrides:
    by a path relative to this preset's file, or by the name of one of the package's presets. A
    value `null` is "not given": it takes a base's value away, and leaves the flag its default.

    Returns:
        argparse destination -> value.

    Raises:
        ValueError: for a missing file, bad YAML, an unknown key (the error names the nearest known
            key) or a value that the flag would refuse.
    """
    known = _names(parser)
    defaults: dict[str, Any] = {}
    for file, values in preset_chain(path):
        refuse_unknown(file, values, known)
        for key, value in values.items():
            action, by_flag = known[key]
            if value is None:
                defaults.pop(action.dest, None)
                continue
            defaults[action.dest] = _value(f"--config {file}: {key}", value, action, by_flag)
    return defaults


def _value(where: str, value: Any, action: argparse.Action, by_flag: bool) -> Any:
    """A preset's `value` as the parser would store it.

    Args:
        where: names the preset and the key in errors.
        by_flag: whether the key is the flag's own name; `no_x: true` then turns x off.
    """
    if isinstance(action, argparse._StoreTrueAction | argparse._StoreFalseAction):
        if not isinstance(value, bool):
            raise ValueError(f"{where} is {value!r}; use true or false")
        on = isinstance(action, argparse._StoreTrueAction)
        return value == on if by_flag else value
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError(f"{where} is {value!r}; use true or false")
        return value
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
    # Types of Megatron read a list from text, and YAML may have made the text a list already.
    plain = action.type in (int, float, str, None)
    if isinstance(value, bool | dict) or (isinstance(value, list) and plain):
        raise ValueError(f"{where} is {value!r}, not a valid {kind}")
    try:
        converted = action.type(str(value)) if action.type else value
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{where}: {error}") from None
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"{where} is {value!r}, not a valid {kind}") from None
    if action.choices is not None and converted not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise ValueError(f"{where} is {value!r}; use one of {choices}")
    return converted


def add_opposites(parser: argparse.ArgumentParser) -> None:
    """Give each switch without an opposite a hidden one, so that a command line can turn off what a
    preset turned on: `--no-bf16` for `--bf16`, `--rope-fusion` for `--no-rope-fusion`."""
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
    for name in ("config", "help", "h", "help_megatron", "version"):
        names.pop(name, None)
    return names


def keys() -> list[str]:
    """Every key that a preset may have, from the parser of the training entry, sorted."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_mlra.training.flags import add_mlra_arguments

    parser = argparse.ArgumentParser()
    add_megatron_arguments(parser)
    add_mlra_arguments(parser)
    return sorted(name for name in {*_names(parser), "base"} if name.isidentifier())
