"""What of a command line can be refused before torch and Megatron are imported, within a second.

No list of flags is kept here but `_UNDERSCORED`. The known flags are those of this project's parser
and the keys that a preset may have, which are generated from Megatron's parser. Presets, folders
and data are checked by the functions that check them again when all arguments are known.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any, NoReturn

from megatron_mlra.command_line.early import EMPTY, a_plain_file, named
from megatron_mlra.command_line.parser import check_writable, flag, flags_given
from megatron_mlra.command_line.suggest import refusal
from megatron_mlra.data.prefixes import NO_DATA, a_dataset, check_files, without_weights
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
"""Flags of Megatron that are spelt with an underscore. The keys of presets do not show it."""


def check(argv: list[str]) -> Namespace:
    """Refuse unknown flags, unreadable presets, missing data, unusable --save and --load folders.

    Returns:
        `save` and `load`, None where the command line does not name them or is not yet understood.

    Raises:
        ValueError: one line that names the flag and the fix.
    """
    if "--help-megatron" in argv:
        return Namespace(save=None, load=None)
    if not __debug__:
        _refuse(
            "Python runs without assertions (-O, or PYTHONOPTIMIZE), by which Megatron refuses"
            " flags that cannot work; run it without"
        )
    _check_flags(argv)
    preset = flags.preset_of(argv, _refuse)
    values = {} if preset is None else preset_values(preset)
    # A user's own preset may hold bad values, which are reported before missing ones. That report
    # needs Megatron's parser, so missing values are reported here for the package's presets alone.
    is_known = preset is None or find_preset(preset).is_relative_to(FOLDER)
    there = flags_given(argv)
    if is_known:
        check_required(lambda name: values.get(name) is not None or flag(name) in there)
    given = _given(argv, values)
    for name in _PATHS:
        if given is not None and getattr(given, name) == "":
            # Megatron takes an empty --save for none, and saves nothing.
            _refuse(f"{flag(name)} {EMPTY}")
    if given is None or given.dry_run is not None:
        # --dry-run plans for another machine, with other folders.
        return Namespace(save=None, load=None)
    if given.save is not None:
        with named(f"--save {given.save}"):
            check_writable(given.save, f"--save {Path(given.save)}")
            saved_steps.check_unused(given)
    with named(f"--load {given.load}"):
        saved_steps.to_load(given)
    if not (given.mock_data or given.skip_train):
        words = [word for name in _DATA for word in getattr(given, name)]
        if is_known and not (words or any(getattr(given, name) for name in _DATA_FILES)):
            _refuse(NO_DATA)
        for prefix in without_weights(words):
            with named(f"--data-path {prefix}"):
                check_files(prefix)
    for name in _DATA_FILES:
        if (file := getattr(given, name)) is not None and Path(file).exists():
            a_plain_file(file, flag(name))
    for held_out in given.held_out:
        with named(f"--held-out {held_out}"):
            a_dataset(held_out, "--held-out")
    return Namespace(save=given.save, load=given.load)


def _check_flags(argv: list[str]) -> None:
    """Refuse unknown flags.

    Raises:
        ValueError: names the flag, and the known flag that is likely meant.
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
    """The arguments that `check` reads: of the command line, else of a preset's `values`.

    Returns:
        None where a preset's value has not the type of its flag. load_preset reports that later.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = _refuse
    for name in (*_DATA, "held_out"):
        parser.add_argument(flag(name), nargs="*", default=[])
    for name in _PATHS:
        parser.add_argument(flag(name))
    for name in _SWITCHES:
        parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=False)
    for name in _NUMBERS:
        parser.add_argument(flag(name), type=int)
    kinds = dict.fromkeys(_DATA, str | list) | {"held_out": list} | dict.fromkeys(_PATHS, str)
    kinds |= dict.fromkeys(_SWITCHES, bool) | dict.fromkeys(_NUMBERS, int)
    for name, kind in kinds.items():
        value = values.get(name)
        if value is None:
            continue
        if not isinstance(value, kind):
            return None
        if name in _DATA or name == "held_out":
            value = value.split() if isinstance(value, str) else list(map(str, value))
        parser.set_defaults(**{name: value})
    return parser.parse_known_args(argv)[0]


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
