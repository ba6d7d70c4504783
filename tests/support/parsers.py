"""Megatron's command line, built often in one process."""

from __future__ import annotations


def read_help_once() -> None:
    """Keep what Megatron reads out of its own sources for the help of its flags: it reads them for
    every parser, and takes most of a parser's time for it."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    read, kept = ArgumentGroupFactory._get_field_docstrings, {}

    def read_once(self: ArgumentGroupFactory, source: type) -> dict[str, str]:
        if source not in kept:
            kept[source] = read(self, source)
        return dict(kept[source])

    ArgumentGroupFactory._get_field_docstrings = read_once
