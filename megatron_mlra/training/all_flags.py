"""All flags of the training entry, Megatron's too, by a parser that needs no Megatron.

Megatron's flags are read from presets/flags.txt, a line each. `python -m
megatron_mlra.training.all_flags` writes it of Megatron's parser, and presets/keys.txt:

    NAMES DEST KIND [CHOICES]

    --train-iters train_iters int
    --data-path data_path str*
    --fp8-format fp8 str e4m3,hybrid

KIND is a type; `pattern` of layers; `on`, `off` or `both` of a switch; `enum`, by the names of
Megatron's; or `other`, whose values Megatron converts, and which are left to its parser. A type may
be followed by argparse's number of values.
"""

from __future__ import annotations

import argparse
import functools
import re
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_mlra.command_line.suggest import refusal
from megatron_mlra.description.layer_pattern import layer_pattern
from megatron_mlra.description.presets import FOLDER, KEYS
from megatron_mlra.training.flags import add_mlra_arguments
from megatron_mlra.training.presets import add_opposites, keys, load_preset

FLAGS = FOLDER / "flags.txt"
TYPES = {"int": int, "float": float, "str": str}
PATTERNS = ("no_rope_freq_type", "moe_freq_type", "la_freq_type")
"""Megatron's functions that evaluate a pattern of layers; `layer_pattern` is in their place."""
SWITCHES = {"on": "store_true", "off": "store_false", "both": argparse.BooleanOptionalAction}


def parse(argv: list[str], preset: str | None) -> Namespace:
    """What a command line and its preset give, by argparse destination. No defaults.

    Args:
        argv: the words behind the program's name.
        preset: the value of `--config`.

    Raises:
        ValueError: one line that names the flag, or the preset's key, and the fix.
    """
    values = {} if preset is None else load_preset(preset, _parser())
    return _parser(opposites=True).parse_args(argv, Namespace(**values))


@functools.cache
def _parser(opposites: bool = False) -> argparse.ArgumentParser:
    """The parser; presets are read by the one without opposites, as by Megatron's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_mlra_arguments(parser)
    for line in FLAGS.read_text(encoding="utf-8").splitlines():
        _add(parser, *line.split())
    if opposites:
        add_opposites(parser)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        if action.dest == "yaml_cfg":
            action.type = no_yaml_cfg

    def error(message: str) -> NoReturn:
        raise ValueError(refusal(message, parser._option_string_actions))

    parser.error = error
    return parser


def _add(
    parser: argparse.ArgumentParser, names: str, dest: str, kind: str, choices: str = ""
) -> None:
    if kind in SWITCHES:
        parser.add_argument(*names.split(","), dest=dest, action=SWITCHES[kind])
        return
    name, count = re.fullmatch(r"([a-z]+)([*+]|\d*)", kind).groups()
    known = choices.split(",") if choices else []
    types = TYPES | {"pattern": layer_pattern, "enum": member(str, known)}
    convert = types.get(name, _left)
    more: dict[str, Any] = {"nargs": int(count) if count.isdigit() else count} if count else {}
    if known and name != "enum":
        more["choices"] = [convert(each) for each in known]
    parser.add_argument(*names.split(","), dest=dest, type=convert, **more)


def member(convert: Callable[[str], Any], names: list[str]) -> Callable[[str], Any]:
    """A conversion to an enum member, with argparse's error for an unknown name."""

    def enum_member(name: str) -> Any:
        if name not in names:
            choices = ", ".join(names)
            raise argparse.ArgumentTypeError(f"invalid choice {name!r}; use one of {choices}")
        return convert(name)

    return enum_member


def no_yaml_cfg(value: str) -> NoReturn:
    """The conversion of `--yaml-cfg`, a file that Megatron reads while parsing in place of all
    other flags."""
    raise argparse.ArgumentTypeError(f"{value} would replace all flags; use --config FILE.yaml")


def _left(value: str) -> str:
    """A value that is left to Megatron's parser."""
    return value


def lines() -> list[str]:
    """The lines of flags.txt, in the order of Megatron's parser."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(add_help=False)
    add_megatron_arguments(parser)
    return [_line(action) for action in parser._actions]


def _line(action: argparse.Action) -> str:
    names, dest = ",".join(action.option_strings), action.dest
    if isinstance(action, argparse.BooleanOptionalAction):
        return f"{action.option_strings[0]} {dest} both"  # _add makes the opposite
    if action.nargs == 0:
        return f"{names} {dest} {'on' if action.const else 'off'}"
    kind = getattr(action.type or str, "__name__", "")
    if kind == "enum_type_handler":  # Megatron's, of the names of an enum
        kind = "enum"
    elif kind in PATTERNS:
        kind = "pattern"
    elif kind not in TYPES:
        return f"{names} {dest} other{action.nargs or ''}"
    choices = ",".join(getattr(each, "name", str(each)) for each in action.choices or ())
    return f"{names} {dest} {kind}{action.nargs or ''} {choices}".rstrip()


if __name__ == "__main__":
    for file, written in ((KEYS, keys()), (FLAGS, lines())):
        file.write_text("\n".join(written) + "\n", encoding="utf-8")
