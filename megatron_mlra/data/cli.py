"""Command line of `mlra preprocess`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

from megatron_mlra.command_line.numbers import real
from megatron_mlra.command_line.parser import OneLineParser, fail, one_line
from megatron_mlra.command_line.signals import Interrupted, interruptible
from megatron_mlra.data.errors import BadRecordError, InputError
from megatron_mlra.data.pipeline import PreprocessConfig, preprocess
from megatron_mlra.data.readers import RECORD_BYTES
from megatron_mlra.data.shards import DEFAULT_EOD
from megatron_mlra.data.tokenizers import TOKENIZER_TYPES, TokenizerSpec


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = OneLineParser(
        description="Turn text, JSON lines, parquet or token shards into a dataset that `mlra"
        " pretrain`"
        " reads by --data-path.",
        epilog="example: mlra preprocess --input my.jsonl --output-prefix data/my --tokenizer byte",
    )
    add = flags.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="files to read, or quoted globs")
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .json")
    add(
        "--tokenizer",
        choices=TOKENIZER_TYPES,
        help="byte: no vocabulary file; needed unless the input is token shards",
    )
    add(
        "--tokenizer-model",
        metavar="PATH",
        help="hf: tokenizer.json or its folder; tiktoken: encoding name or ranks file",
    )
    add("--eod-token", metavar="TOKEN", help="hf: text of the token that ends a document")
    add(
        "--eod-id",
        type=int,
        metavar="ID",
        help=f"id of the token that ends a document: shards (default {DEFAULT_EOD}), tiktoken"
        f" ranks files",
    )
    add("--tiktoken-pattern", metavar="REGEX", help="ranks file: word pattern (default: GPT-2's)")
    add(
        "--vocab-size", type=int, metavar="N", help="token shards: vocabulary (default: EOD id + 1)"
    )
    add("--no-append-eod", action="store_true", help="do not end documents with the EOD id")
    add("--json-key", default="text", help="key of the text in a JSON line (default: text)")
    add("--parquet-column", default="text", help="column of the text (default: text)")
    add(
        "--max-record-mb",
        type=real(above=0, most=1e6),
        default=RECORD_BYTES / 1e6,
        metavar="MB",
        help="most decompressed megabytes of a line, text file, cell or document of token shards"
        " (default: %(default)g)",
    )
    add("--split-lines", action="store_true", help="text files: every line is a document")
    add("--workers", type=int, default=1, metavar="N", help="processes that tokenise (default: 1)")
    add(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="what to do at a bad record (default: fail)",
    )
    add("--overwrite", action="store_true", help="replace earlier output")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2: wrong arguments or inputs; 1: a bad record or
    a failed write; 128 + the number of a stop signal)."""
    args = parser().parse_args(argv)
    try:
        with interruptible():
            metadata = preprocess(_config(args), report=_report_skipped, progress=True)
    except BadRecordError as error:
        return fail(f"{error}; nothing written", 1)
    except InputError as error:
        return fail(str(error), 2)
    except BrokenProcessPool:
        return fail("a worker process died, perhaps for lack of memory; nothing written", 1)
    except OSError as error:
        return fail(f"{error}; nothing written", 1)
    except Interrupted as error:
        return fail("interrupted; temporary files removed", 128 + error.number)
    print(
        "{documents} documents, {tokens} tokens ({dtype}, vocabulary {vocab_size}, EOD {eod_id}), "
        "{empty_documents} empty documents and {bad_records} bad records left out".format_map(
            metadata
        )
    )
    print(f"wrote {args.output_prefix}.bin, .idx and .json")
    return 0


def _config(args: argparse.Namespace) -> PreprocessConfig:
    spec = None
    if args.tokenizer is not None:
        spec = TokenizerSpec(
            type=args.tokenizer,
            model=args.tokenizer_model,
            eod_token=args.eod_token,
            eod_id=args.eod_id,
            pattern=args.tiktoken_pattern,
        )
    return PreprocessConfig(
        inputs=tuple(args.input),
        output_prefix=args.output_prefix,
        tokenizer=spec,
        json_key=args.json_key,
        parquet_column=args.parquet_column,
        record_bytes=int(args.max_record_mb * 1e6),
        split_lines=args.split_lines,
        append_eod=not args.no_append_eod,
        shard_eod_id=DEFAULT_EOD if args.eod_id is None else args.eod_id,
        shard_vocab_size=args.vocab_size,
        workers=args.workers,
        on_error=args.on_error,
        overwrite=args.overwrite,
    )


def _report_skipped(problem: str) -> None:
    print(f"skipped {one_line(problem)}", file=sys.stderr)
