"""The flags of `mlra benchmark-cpu`."""

from __future__ import annotations

from typing import Any

from megatron_mlra.command_line.early import reads
from megatron_mlra.command_line.numbers import whole
from megatron_mlra.command_line.parser import OneLineParser
from megatron_mlra.description.presets import a_preset, preset_values

NEEDED = (
    *("attention", "global_batch_size", "lr", "micro_batch_size", "norm_epsilon", "rotary_base"),
    *("seq_length", "vocab_size"),
)
"""What the plain loop takes from a preset."""


def parser() -> OneLineParser:
    """The flags."""
    flags = OneLineParser(
        description="Training speed on the CPU: mlra pretrain against a plain torch loop of the"
        " same model."
    )
    add = flags.add_argument
    config = add("--config", default="debug", help="a preset by name or path (default: debug)")
    reads(config, lambda name, flag: (a_preset(name, flag), measured(name)))
    add(
        "--steps",
        type=whole(1),
        default=30,
        help="steps to measure, in each of the two ways (default: 30)",
    )
    add("--warmup", type=whole(0), default=3, help="steps left out of every turn (default: 3)")
    return flags


def measured(config: str) -> dict[str, Any]:
    """The values of a preset that can be measured.

    Raises:
        ValueError: it cannot be read, or is none that the plain loop trains.
    """
    preset = preset_values(config)
    if missing := [name for name in NEEDED if preset.get(name) is None]:
        raise ValueError(f"--config {config} says nothing of {', '.join(missing)}; add it")
    sizes = {preset["micro_batch_size"], preset["global_batch_size"]}
    if preset["attention"] != "mlra" or preset.get("bf16") or len(sizes) > 1:
        raise ValueError(
            f"--config {config}: use an mlra preset in float32, one micro-batch per step"
        )
    return preset
