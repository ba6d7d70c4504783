"""Command line of `mlra demo-corpus`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_mlra.command_line.early import writes
from megatron_mlra.command_line.numbers import real
from megatron_mlra.command_line.parser import OneLineParser, check_output
from megatron_mlra.data.demo_corpus import write_demo_corpus


def parser() -> OneLineParser:
    """The flags."""
    flags = OneLineParser(
        description="Write the demo's corpus, English and code from the files of this Python, as"
        " JSON lines."
    )
    output = flags.add_argument("output", metavar="OUT.jsonl", help="the file to write")
    writes(output, check_output)
    flags.add_argument(
        "--max-mb",
        type=real(above=0),
        default=24,
        help="most megabytes of text (default: 24)",
    )
    flags.add_argument(
        "--seed", type=int, default=0, help="which order the documents have (default: 0)"
    )
    flags.add_argument("--overwrite", action="store_true", help="replace OUT.jsonl")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    flags = parser()
    args = flags.parse_args(argv)
    if not args.output.endswith(".jsonl"):
        flags.error(f"{args.output} must end in .jsonl")
    if os.path.exists(args.output) and not args.overwrite:
        flags.error(f"{args.output} exists: pass --overwrite to replace it")
    try:
        check_output(args.output, "OUT.jsonl")
        size = write_demo_corpus(args.output, int(args.max_mb * 1e6), args.seed)
    except (ValueError, OSError) as error:
        flags.error(str(error))
    print(f"{size.documents} documents, {size.text_bytes} bytes of text in {args.output}")
    return 0
