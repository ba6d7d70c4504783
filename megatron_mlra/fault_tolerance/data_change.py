"""Changes of the training data, or of their order, between a checkpoint and the run that resumes.

A run that resumes passes over as many samples as the checkpoint has seen. In another order these
are not the samples that it has seen.
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from typing import Any

from megatron_mlra.command_line.parser import flag, one_line

_PLACES = ("data_path", "train_data_path", "data_args_path", "per_split_data_args_path")


def other_samples(saved: Namespace, args: Namespace) -> str | None:
    """A warning if this run does not go on with the samples of a checkpoint, or None.

    Args:
        saved: arguments of the checkpoint, with the number of samples that it has seen.
        args: those of this run.
    """
    seen = getattr(saved, "consumed_train_samples", 0)
    if not isinstance(seen, int) or not seen or args.finetune or args.skip_train:
        return None
    place, order = _place(saved, args), (_split(saved, args), _seed(saved, args))
    changes = [
        f"{name} is {here} (it was {there})" for name, there, here in (place, *order) if name
    ]
    if not changes:
        return None
    elsewhere = "" if any(name for name, *_ in order) else "unless these are the same data, "
    return one_line(
        f"warning: {'; '.join(changes)}: {elsewhere}the samples are others than before, or in"
        f" another order. Some of the {seen:,} that are behind the run may come again, held-out"
        " ones too; give the values that were to go on as before, or --finetune for a new run"
    )


_SAME = ("", "", "")


def _place(saved: Namespace, args: Namespace) -> tuple[str, str, str]:
    """The flag that names the data, its value there and here; empty where they are the same."""
    (_, there), (name, here) = _data(saved), _data(args)
    if None in (there, here) or _absolute(there) == _absolute(here):
        return _SAME
    return name, *(" ".join(each) or "--mock-data" for each in (there, here))


def _data(args: Namespace) -> tuple[str, list[str] | None]:
    """The flag that names the training data, and its words: none for mock data."""
    if getattr(args, "mock_data", False):
        return "the data", []
    for name in _PLACES:
        if value := getattr(args, name, None):
            return flag(name), [*map(str, value if isinstance(value, list) else [value])]
    return "", None


def _absolute(words: list[str]) -> list[str]:
    """With weights, of which the same becomes the same."""
    return [os.path.abspath(word) for word in words]


def _split(saved: Namespace, args: Namespace) -> tuple[str, str, str]:
    there, here = (getattr(each, "split", None) for each in (saved, args))
    if None in (there, here) or _shares(there) == _shares(here):
        return _SAME
    return "--split", there, here


def _shares(split: str) -> list[float]:
    """The three parts of a `--split`, as Megatron reads it."""
    parts = [float(part) for part in re.findall(r"\d+\.?\d*|\.\d+", str(split))]
    return [round(part / (sum(parts) or 1), 9) for part in (*parts, 0.0, 0.0, 0.0)[:3]]


def _seed(saved: Namespace, args: Namespace) -> tuple[str, str, str]:
    there, here = (_seed_of(each) for each in (saved, args))
    if None in (there, here) or there == here:
        return _SAME
    own = any(getattr(each, "data_seed", None) is not None for each in (saved, args))
    return "--data-seed" if own else "--seed", str(there), str(here)


def _seed_of(args: Namespace) -> Any:
    own = getattr(args, "data_seed", None)
    return getattr(args, "seed", None) if own is None else own
