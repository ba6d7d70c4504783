"""What of a command line can be refused before torch and Megatron are imported, within a second.

No list of flags is kept here but `_UNDERSCORED`. The known flags, and the kinds of their values,
are those of this project's parser and those that were generated from Megatron's (all_flags.py).
Presets, values, folders and data are checked by the functions that check them again when all
arguments are known.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import NoReturn

from megatron_mlra.command_line.early import EMPTY, a_plain_file, named
from megatron_mlra.command_line.parser import check_writable, flag, flags_given
from megatron_mlra.command_line.suggest import refusal
from megatron_mlra.data.prefixes import NO_DATA, a_dataset, check_files, without_weights
from megatron_mlra.description.presets import KEYS
from megatron_mlra.fault_tolerance import saved_steps
from megatron_mlra.training import all_flags, data_sources, flags
from megatron_mlra.training.unread_flags import check_read
from megatron_mlra.training.value_checks import check_lengths, check_required, check_values

_DATA_FILES = ("data_args_path", "per_split_data_args_path")
_PATHS = ("save", "load", *_DATA_FILES)
_LOG = "result_rejected_tracker_filename"
_WRITTEN = ("moe_routing_trace_path", "tensorboard_dir", _LOG)
"""What Megatron writes beside checkpoints: folders, and a log."""
_SWITCHES = ("mock_data", "skip_train", "exit_on_missing_checkpoint")
_OTHERS = ("ckpt_step", "dry_run", "held_out", "nccl_communicator_config_path")
_READ = (*data_sources.PREFIXES, *_PATHS, *_SWITCHES, *_WRITTEN, *_OTHERS)
_UNDERSCORED = ("--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler")
"""Flags of Megatron that are spelt with an underscore. The keys of presets do not show it."""


def check(argv: list[str]) -> Namespace:
    """Refuse unknown flags and bad values, of presets too, missing data, unusable --save and --load
    folders.

    Returns:
        `save` and `load`, None where neither the command line nor its preset names them.

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
    given = Namespace(**dict.fromkeys(_READ) | vars(parsed(argv)))
    check_required(given)
    check_lengths(given)
    for name in _PATHS:
        if getattr(given, name) == "":
            # Megatron takes an empty --save for none, and saves nothing.
            _refuse(f"{flag(name)} {EMPTY}")
    if given.dry_run is not None:
        # --dry-run plans for another machine, with other folders.
        return Namespace(save=None, load=None)
    if given.save is not None:
        with named(f"--save {given.save}"):
            check_writable(given.save, f"--save {Path(given.save)}")
            saved_steps.check_unused(given)
    with named(f"--load {given.load}"):
        saved_steps.to_load(given)
    if not (given.mock_data or given.skip_train):
        words = [word for name in data_sources.PREFIXES for word in getattr(given, name) or ()]
        if not (words or any(getattr(given, name) for name in _DATA_FILES)):
            _refuse(NO_DATA)
        for prefix in without_weights(words):
            with named(f"--data-path {prefix}"):
                check_files(prefix)
    for name in _DATA_FILES:
        if (file := getattr(given, name)) is not None and Path(file).exists():
            a_plain_file(file, flag(name))
    for name in _WRITTEN:
        path = getattr(given, name)
        if path is not None:
            with named(f"{flag(name)} {path}"):
                folder = Path(path).parent if name == _LOG else Path(path)
                check_writable(folder, f"{flag(name)} {path}")
    if (file := given.nccl_communicator_config_path) is not None:
        a_plain_file(file, flag("nccl_communicator_config_path"))
    for held_out in given.held_out or ():
        with named(f"--held-out {held_out}"):
            a_dataset(held_out, "--held-out")
    return Namespace(save=given.save, load=given.load)


def parsed(argv: list[str]) -> Namespace:
    """What a command line and its preset give, by argparse destination; no defaults.

    Raises:
        ValueError: an unknown flag, or a value that cannot work whatever the others are; one line
            that names it.
    """
    _check_flags(argv)
    given = all_flags.parse(argv, flags.preset_of(argv, _refuse))
    data_sources.settle(given, flags_given(argv))
    check_values(given)
    check_read(given)
    return given


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


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
