"""Command line of `mlra twin`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_mlra.command_line.early import writes
from megatron_mlra.command_line.parser import OneLineParser, check_output, write_text
from megatron_mlra.cost.cache import DTYPE, kv_cache_bytes_per_token
from megatron_mlra.cost.parameters import parameters
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.presets import find_preset, preset_name
from megatron_mlra.planner.twin import VARIANTS, Twin, twin


def parser() -> OneLineParser:
    """The flags."""
    flags = OneLineParser(
        description="Write the preset of a model with other attention and as many parameters"
        " (within"
        " 0.1 %).",
        epilog="example: mlra twin mlra4_2.9b --attention mla --output mla.yaml",
    )
    flags.add_argument("preset", help="the preset to be equal to, by name or path")
    flags.add_argument(
        "--attention", required=True, metavar="NAME", help=f"one of: {', '.join(VARIANTS)}"
    )
    output = flags.add_argument(
        "--output", type=Path, metavar="FILE.yaml", help="file to write; default: print it"
    )
    writes(output, check_output)
    flags.add_argument("--overwrite", action="store_true", help="replace FILE.yaml")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Write or print the twin and print both models; returns the exit code."""
    flags = parser()
    args = flags.parse_args(argv)
    try:
        if args.output is not None:
            check_output(args.output, "--output")
            if args.output.exists() and not args.overwrite:
                raise ValueError(f"--output {args.output} exists; pass --overwrite to replace it")
        found = twin(args.preset, args.attention)
        folder = args.output.parent if args.output else find_preset(args.preset).parent
        text = found.to_yaml(folder, preset_name(args.preset))
        if args.output is not None:
            write_text(args.output, text)
    except (ValueError, OSError) as error:
        flags.error(str(error))
    print(table(found, preset_name(args.preset)))
    print(f"wrote {args.output}" if args.output else "\n" + text.rstrip())
    return 0


def table(found: Twin, source: str) -> str:
    """A table of both models, one column each, at most 80 characters wide."""
    columns = [
        (
            "",
            "attention",
            "MLP size",
            "parameters",
            "without embedding",
            "difference",
            f"KV bytes per token and device in {DTYPE}, TP1",
            "TP4",
            "TP8",
        )
    ]
    for name, shape, title in (
        (source, found.source, found.source.variant),
        ("twin", found.shape, found.title),
    ):
        total = parameters(shape).total
        kv = (kv_cache_bytes_per_token(shape, tp) for tp in (1, 4, 8))
        columns.append(
            (
                name,
                title,
                f"{_mlp(shape):,}",
                f"{total:,}",
                f"{total - parameters(shape).embedding - parameters(shape).output_layer:,}",
                "" if shape is found.source else f"{100 * found.difference:+.4f} %",
                *(f"{each:,}" for each in kv),
            )
        )
    first, *others = (max(map(len, column)) for column in columns)
    return "\n".join(
        f"{head.ljust(first)}  "
        + "  ".join(cell.rjust(width) for cell, width in zip(cells, others, strict=True))
        for head, *cells in zip(*columns, strict=True)
    )


def _mlp(shape: ModelDescription) -> int:
    """The MLP size that is adapted: the dense one, or that of the shared or routed experts."""
    if not shape.num_experts:
        return shape.ffn_hidden_size
    return shape.moe_shared_expert_intermediate_size or shape.moe_ffn_hidden_size
