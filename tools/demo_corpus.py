"""Write the demo's corpus, English and code that every Python carries, as JSON lines."""

import os

from megatron_mlra.command_line.parser import OneLineParser, run
from megatron_mlra.data.demo_corpus import write_demo_corpus


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("output", metavar="OUT.jsonl")
    parser.add_argument("--max-mb", type=float, default=24, help="most text, in 1e6 bytes")
    parser.add_argument("--seed", type=int, default=0, help="of the order of documents")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.jsonl")
    args = parser.parse_args()
    if not args.output.endswith(".jsonl"):
        parser.error(f"{args.output} must end in .jsonl")
    if os.path.exists(args.output) and not args.overwrite:
        parser.error(f"{args.output} exists: pass --overwrite to replace it")
    try:
        size = write_demo_corpus(args.output, int(args.max_mb * 1e6), args.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{size.documents} documents, {size.text_bytes} bytes of text in {args.output}")
    return 0


if __name__ == "__main__":
    run(main)
