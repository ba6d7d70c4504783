"""The flags, inputs and exit codes that `mlra evaluate` and `mlra analyze` share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np

from megatron_mlra.command_line import parser as command_line
from megatron_mlra.command_line.early import a_file, byte_or_there, reads
from megatron_mlra.command_line.threads import wait_passively
from megatron_mlra.evaluation.token_stream import named_sets, read_stream


def add_inputs(command: argparse.ArgumentParser) -> None:
    """Add the flags of texts, tokenizer, device and checksums."""
    text = command.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="text files in UTF-8"
    )
    reads(text, a_file)
    tokenizer = command.add_argument(
        "--tokenizer", help="'byte' or a folder with tokenizer.json; default: the checkpoint's own"
    )
    reads(tokenizer, byte_or_there)
    command.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    command_line.add_no_verify(command)


def read_inputs(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The texts of --text by file, and the tokens of --data by name.

    Raises:
        ValueError: an input is missing, empty or damaged, or a name is given twice.
    """
    texts = {file: command_line.read_text(file, newline="") for file in args.text}
    if empty := next((file for file, text in texts.items() if not text), None):
        raise ValueError(f"{empty} is empty")
    sets = named_sets(args.data, "--data")
    streams = {name: read_stream(prefix) for name, prefix in sets.items()}
    if args.verify:
        from megatron_mlra.data.contents import check_contents

        for prefix in sets.values():
            check_contents(prefix, None)
    return texts, streams


def check_tokens(file: str, count: int) -> None:
    """Refuse a text of no tokens, as blanks are to some tokenizers.

    Raises:
        ValueError: names the file.
    """
    if not count:
        raise ValueError(f"{file} has no tokens, by its tokenizer; give a text with words")


def run(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], object],
    argv: Sequence[str] | None,
) -> int:
    """Parse the flags and do the command's work; returns 0, or 2 after an error of one line."""
    wait_passively()
    args = parser.parse_args(argv)
    try:
        work(args)
    except ModuleNotFoundError as error:
        return command_line.fail(f"{error}; install the extra megatron-mlra[hf]", 2)
    except (ValueError, OSError) as error:
        return command_line.fail(str(error), 2)
    return 0
