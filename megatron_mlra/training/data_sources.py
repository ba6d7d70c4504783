"""Where the training data come from: one source, and the command line's before the preset's."""

from __future__ import annotations

from argparse import Namespace

from megatron_mlra.command_line.parser import flag

PREFIXES = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
"""Arguments of prefixes of data."""
SOURCES = (
    ("mock_data",),
    PREFIXES[:1],
    PREFIXES[1:],
    ("data_args_path",),
    ("per_split_data_args_path",),
)
"""Arguments of one source each, of which a run has one."""


def settle(args: Namespace, given: set[str]) -> None:
    """Drop the preset's sources where the command line names another.

    Args:
        args: some or all arguments; one that is missing counts as None.
        given: flags on the command line.

    Raises:
        ValueError: the command line names two sources, or the preset does.
    """
    asked = [source for source in SOURCES if any(flag(name) in given for name in source)]
    there = [source for source in SOURCES if any(getattr(args, name, None) for name in source)]
    for sources, who in ((asked, "the command line"), (there if not asked else [], "the preset")):
        if len(sources) > 1:
            one, other = (
                next(
                    flag(name)
                    for name in source
                    if flag(name) in given or getattr(args, name, None)
                )
                for source in sources[:2]
            )
            raise ValueError(f"{who} names data by {one} and by {other}; leave one out")
    for source in there:
        if asked and source not in asked:
            for name in source:
                setattr(args, name, False if name == "mock_data" else None)
