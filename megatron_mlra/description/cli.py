"""Command line of `mlra presets`: the list of presets, or the values of one."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mlra.command_line.parser import OneLineParser
from megatron_mlra.description.presets import ALIASES, find_preset, preset_list, preset_values


def parser() -> OneLineParser:
    """The flags."""
    flags = OneLineParser(
        description="List the presets of the package, or print one with the values of its bases."
    )
    flags.add_argument("preset", nargs="?", help="a name, or a path: print this one's values")
    flags.add_argument("--path", action="store_true", help="print where its file lies instead")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Print; returns the exit code."""
    flags = parser()
    args = flags.parse_args(argv)
    if args.preset is None:
        if args.path:
            flags.error("--path needs the name of a preset")
        print(preset_list())
        return 0
    try:
        values = preset_values(args.preset)
    except (ValueError, OSError) as error:
        flags.error(str(error).removeprefix("--config "))
    if args.path:
        print(find_preset(args.preset))
        return 0
    names = {destination: name for name, destination in ALIASES.items()}
    for key, value in values.items():
        print(f"{names.get(key, key)}: {_plain(value)}")
    return 0


def _plain(value: object) -> str:
    """A value as YAML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
