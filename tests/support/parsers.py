"""Makes building Megatron's command line cheap for a process that builds it often."""

from __future__ import annotations


def read_help_once() -> None:
    """Cache the help of flags that Megatron reads from its own sources. Megatron reads the sources
    for every parser, which takes most of the time of building a parser."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    read, kept = ArgumentGroupFactory._get_field_docstrings, {}

    def read_once(self: ArgumentGroupFactory, source: type) -> dict[str, str]:
        if source not in kept:
            kept[source] = read(self, source)
        return dict(kept[source])

    ArgumentGroupFactory._get_field_docstrings = read_once
