"""What of a command line can be refused before torch and Megatron are imported, within a second.

Nothing here is a list of its own, but for `_UNDERSCORED`. Flags are those of this project's parser
and the keys that a preset may have, which are made of Megatron's parser; presets, folders and data
are looked at by the functions that look at them again later, when all arguments are known.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from typing import Any, NoReturn

from megatron_mlra.command_line.parser import flag, flags_given
from megatron_mlra.command_line.suggest import refusal
from megatron_mlra.data.prefixes import NO_DATA, check_files, without_weights
from megatron_mlra.description.presets import FOLDER, KEYS, find_preset, preset_values
from megatron_mlra.fault_tolerance import saved_steps
from megatron_mlra.training import flags
from megatron_mlra.training.number_checks import check_required

_DATA = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
_DATA_FILES = ("data_args_path", "per_split_data_args_path")
_PATHS = ("save", "load", *_DATA_FILES)
_SWITCHES = ("mock_data", "skip_train", "exit_on_missing_checkpoint")
_NUMBERS = ("ckpt_step", "dry_run")
_UNDERSCORED = ("--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler")
"""Flags of Megatron with an underscore, which keys do not tell."""


def check(argv: list[str]) -> None:
    """Refuse unknown flags, presets that cannot be read, and paths where nothing of use is.

    Raises:
        ValueError: one line that names the flag and the fix.
    """
    if "--help-megatron" in argv:
        return
    _check_flags(argv)
    preset = flags.preset_of(argv, _refuse)
    values = {} if preset is None else preset_values(preset)
    # Of a preset of the user's own, values that cannot be are said before those that are missing.
    is_known = preset is None or find_preset(preset).is_relative_to(FOLDER)
    there = flags_given(argv)
    if is_known:
        check_required(lambda name: values.get(name) is not None or flag(name) in there)
    given = _given(argv, values)
    if given is None or given.dry_run is not None:
        return  # --dry-run is about another machine
    if given.save is not None:
        saved_steps.check_writable("--save", given.save)
        saved_steps.check_unused(given)
    saved_steps.to_load(given)
    if not (given.mock_data or given.skip_train):
        words = [word for name in _DATA for word in getattr(given, name)]
        if is_known and not (words or any(getattr(given, name) for name in _DATA_FILES)):
            _refuse(NO_DATA)
        for prefix in without_weights(words):
            check_files(prefix)


def _check_flags(argv: list[str]) -> None:
    """Refuse a flag that is none.

    Raises:
        ValueError: names it, and the one that is likely meant.
    """
    known = {*flags.parser()._option_string_actions}
    known |= {flag(key) for key in KEYS.read_text(encoding="utf-8").split()}
    for word in argv[: argv.index("--") if "--" in argv else None]:
        name = word.partition("=")[0]
        if not name.startswith("--"):
            continue
        spelt = name.replace("_", "-")
        # Every switch has an opposite.
        alike = {spelt, spelt.replace("--no-", "--", 1), spelt.replace("--", "--no-", 1)}
        if not known & alike:
            _refuse(refusal(f"unrecognized arguments: {name}", known))
        if "_" in name and name.replace("--no-", "--", 1) not in _UNDERSCORED:
            _refuse(refusal(f"unrecognized arguments: {name}", {spelt}))


def _given(argv: list[str], values: dict[str, Any]) -> Namespace | None:
    """What is looked at here, of a command line over a preset's `values`; None where a preset's
    value has not the form of its flag, which is said when all of it is read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = _refuse
    for name in _DATA:
        parser.add_argument(flag(name), nargs="*", default=[])
    for name in _PATHS:
        parser.add_argument(flag(name))
    for name in _SWITCHES:
        parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=False)
    for name in _NUMBERS:
        parser.add_argument(flag(name), type=int)
    kinds = dict.fromkeys(_DATA, str | list) | dict.fromkeys(_PATHS, str)
    kinds |= dict.fromkeys(_SWITCHES, bool) | dict.fromkeys(_NUMBERS, int)
    for name, kind in kinds.items():
        value = values.get(name)
        if value is None:
            continue
        if not isinstance(value, kind):
            return None
        if name in _DATA:
            value = value.split() if isinstance(value, str) else list(map(str, value))
        parser.set_defaults(**{name: value})
    return parser.parse_known_args(argv)[0]


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
