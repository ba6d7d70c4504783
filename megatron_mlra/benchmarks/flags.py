"""The flags of `mlra benchmark-cpu`."""

from __future__ import annotations

from megatron_mlra.command_line.early import reads
from megatron_mlra.command_line.numbers import whole
from megatron_mlra.command_line.parser import OneLineParser
from megatron_mlra.description.presets import a_preset


def parser() -> OneLineParser:
    """The flags."""
    flags = OneLineParser(
        description="Training speed on the CPU: mlra pretrain against a plain torch loop of the"
        " same model."
    )
    add = flags.add_argument
    config = add("--config", default="debug", help="a preset by name or path (default: debug)")
    reads(config, a_preset)
    add(
        "--steps",
        type=whole(1),
        default=30,
        help="steps to measure, in each of the two ways (default: 30)",
    )
    add("--warmup", type=whole(0), default=3, help="steps left out of every turn (default: 3)")
    return flags
