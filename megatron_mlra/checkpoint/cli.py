"""Command lines of checkpoints: inspect, verify, reshard, and conversion between formats."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mlra.checkpoint.files.staging import check_destination
from megatron_mlra.checkpoint.files.tracker import a_checkpoint
from megatron_mlra.command_line.early import a_file, a_folder, byte_or_there, reads, writes
from megatron_mlra.command_line.numbers import real, whole
from megatron_mlra.command_line.parser import OneLineParser, add_no_verify, fail, read_text
from megatron_mlra.command_line.printable import printable
from megatron_mlra.command_line.signals import Interrupted, interruptible
from megatron_mlra.command_line.threads import wait_passively
from megatron_mlra.description.model import DTYPES, CheckpointError

GIGABYTE = 10**9
MOST_FILES = 1000
"""Most files of `reshard`, each of which has a thread that writes it."""


def parser() -> OneLineParser:
    """The flags."""
    flags = OneLineParser(
        description="Convert checkpoints between Megatron (torch_dist), the MLRA paper's research"
        " code and Hugging Face. Runs on the CPU; memory holds about one tensor.",
        epilog="example: mlra convert export-hf runs/my exported/my --tokenizer byte",
    )
    commands = flags.add_subparsers(
        dest="command",
        required=True,
        parser_class=OneLineParser,
        metavar="COMMAND",
        help="one of these:",
    )

    flags.together.append(_check_dtype)

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str):
        added = commands.add_parser(name, help=about, description=about)
        added.set_defaults(run=run)
        add_no_verify(added)
        return added

    def with_source(added: argparse.ArgumentParser, of: str) -> None:
        reads(added.add_argument("source", metavar="SRC", help=of), a_checkpoint)
        added.add_argument(
            "--vocab-size",
            type=whole(1),
            help="true vocabulary, where a Megatron SRC does not say it",
        )

    def with_destination(added: argparse.ArgumentParser) -> None:
        destination = added.add_argument(
            "destination", metavar="DST", help="folder to write; must not exist"
        )
        writes(destination, lambda folder, _: check_destination(Path(folder), 0))
        added.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as they are")
        added.add_argument("--quiet", action="store_true", help="no progress bar")

    megatron = "a run's --save folder, or its iter_* folder"
    inspect = command("inspect", _inspect, "Say what model a folder holds, and check it.")
    with_source(inspect, f"{megatron}, an exported or research folder")
    for name, run, about, of in (
        ("import-official", _import, "Research folder to a Megatron folder.", "research folder"),
        (
            "import-hf", _import, "Hugging Face folder to a Megatron folder.",
            "folder of export-hf or of transformers' save_pretrained",
        ),
        ("export-official", _export_official, "Megatron folder to a research folder.", megatron),
        ("export-hf", _export_hf, "Megatron folder to a Hugging Face folder.", megatron),
        (
            "reshard", _reshard, "Rewrite a Megatron folder: other files, or the weights alone.",
            megatron,
        ),
    ):  # fmt: skip
        added = command(name, run, about)
        if name == "reshard":
            reads(added.add_argument("source", metavar="SRC", help=of), a_checkpoint)
        else:
            with_source(added, of)
        with_destination(added)
        if name.startswith("import"):
            added.add_argument(
                "--padded-vocab-size",
                type=whole(1),
                metavar="ROWS",
                help="rows of the embedding; default: the vocabulary, rounded up to 128",
            )
        elif name.startswith("export"):
            added.add_argument(
                "--max-shard-gb",
                type=real(above=0),
                default=5.0,
                help="most gigabytes of a weights file (default: 5)",
            )
        else:
            added.add_argument(
                "--files",
                type=whole(1, MOST_FILES),
                default=1,
                help="number of files for the tensors (default: 1)",
            )
            added.add_argument(
                "--weights-only", action="store_true", help="leave out the optimizer's state"
            )
        if name == "export-hf":
            tokenizer = added.add_argument(
                "--tokenizer",
                help="byte, or a tokenizer's folder; default: the files beside SRC's weights",
            )
            reads(tokenizer, byte_or_there)
            template = added.add_argument(
                "--chat-template", metavar="FILE", help="Jinja template the model was trained with"
            )
            reads(template, a_file)
        if name == "export-official":
            tokenizer = added.add_argument(
                "--tokenizer",
                metavar="FOLDER",
                help="tokenizer to copy; default: the files beside SRC's weights",
            )
            reads(tokenizer, partial(a_folder, what="a tokenizer's folder"))
            added.add_argument(
                "--format",
                choices=("safetensors", "bin"),
                default="safetensors",
                help="of the weights (default: safetensors)",
            )
    verify = command("verify", _verify, "Compare the logits of two checkpoints on the same text.")
    for name in ("a", "b"):
        folder = verify.add_argument(
            name, metavar=name.upper(), help="checkpoint folder of any kind"
        )
        reads(folder, a_checkpoint)
    text = verify.add_argument("--text", metavar="FILE", help="text to run on; default: a sample")
    reads(text, a_file)
    tokenizer = verify.add_argument(
        "--tokenizer", help="tokenizer.json, or byte; default: A's or B's"
    )
    reads(tokenizer, byte_or_there)
    verify.add_argument(
        "--tokens", type=whole(1), default=512, help="tokens to compare on (default: 512)"
    )
    verify.add_argument(
        "--length", type=whole(1), default=256, help="tokens of a sequence (default: 256)"
    )
    verify.add_argument(
        "--tolerance",
        type=real(0),
        default=1e-4,
        help="largest difference of a logit that passes (default: 1e-4, for float32)",
    )
    verify.add_argument(
        "--transformers",
        action="store_true",
        help="run B, an exported folder, by transformers and the code in the folder",
    )
    verify.add_argument("--vocab-size", type=whole(1), help="true vocabulary of a Megatron folder")
    verify.add_argument("--quiet", action="store_true", help="no progress bar")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (1: verify found a difference, or inspect found
    code; 2: refused; 128 + the number of a stop signal)."""
    wait_passively()
    args = parser().parse_args(argv)
    try:
        with interruptible():
            return args.run(args)
    except Interrupted as error:
        return fail("interrupted; nothing written", 128 + error.number)
    except (ValueError, OSError, ImportError) as error:
        return fail(str(error), 2)


def _open(args: argparse.Namespace, path: str, kinds: Sequence[str] = (), takes_ahead: bool = True):
    """Open a source; `takes_ahead`: the command reads layers of multi-token prediction too."""
    from megatron_mlra.checkpoint.formats import open_checkpoint

    folder = open_checkpoint(path, args.vocab_size, verify=args.verify)
    if kinds and folder.kind not in kinds:
        raise CheckpointError(
            f"{path} is a {folder.kind} folder; {args.command} reads {' or '.join(kinds)} folders"
        )
    if folder.ahead and not takes_ahead:
        print(f"{printable(path)}: {folder.ahead} is left out")
    return folder


def _check_destination(args: argparse.Namespace) -> None:
    """Refuse a wrong destination before the source is read, which may take minutes."""
    check_destination(Path(args.destination), 0)


def _wrote(args: argparse.Namespace) -> int:
    print(f"wrote {args.destination}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from megatron_mlra.checkpoint.files.torch_dist_index import ForbiddenNames
    from megatron_mlra.checkpoint.verify.summary import lines

    try:
        folder = _open(args, args.source)
        if folder.kind == "megatron":
            folder.files.check_tensors()
        print("\n".join(map(printable, lines(folder))))
        folder.check_finite()
    except ForbiddenNames as error:
        return fail(str(error), 1)
    return 0


def _import(args: argparse.Namespace) -> int:
    from megatron_mlra.checkpoint.megatron.writer import write_megatron

    _check_destination(args)
    kind = "research" if args.command == "import-official" else "huggingface"
    write_megatron(
        _open(args, args.source, (kind,)),
        args.destination,
        dtype=args.dtype,
        say=print,
        padded_vocab_size=args.padded_vocab_size,
        progress=not args.quiet,
    )
    return _wrote(args)


def _export_official(args: argparse.Namespace) -> int:
    from megatron_mlra.checkpoint.research.folder import write_research

    kinds = ("megatron", "huggingface")
    return _export(args, kinds, write_research, takes_ahead=False, file_format=args.format)


def _export_hf(args: argparse.Namespace) -> int:
    from megatron_mlra.checkpoint.huggingface.folder import write_huggingface

    kinds = ("megatron", "research")
    return _export(args, kinds, write_huggingface, chat_template=args.chat_template)


def _export(
    args: argparse.Namespace,
    kinds: Sequence[str],
    write: Callable[..., str | None],
    takes_ahead: bool = True,
    **options: Any,
) -> int:
    _check_destination(args)
    problem = write(
        _open(args, args.source, kinds, takes_ahead),
        args.destination,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        max_shard_bytes=int(args.max_shard_gb * GIGABYTE),
        progress=not args.quiet,
        say=print,
        **options,
    )
    if problem:
        print(problem)
    return _wrote(args)


def _check_dtype(args: argparse.Namespace) -> None:
    """Refuse another dtype of a copy with the optimizer's state, which has its own."""
    if args.command == "reshard" and args.dtype is not None and not args.weights_only:
        raise CheckpointError(
            f"--dtype {args.dtype} does not fit the optimizer's state; add --weights-only"
        )


def _reshard(args: argparse.Namespace) -> int:
    from megatron_mlra.checkpoint.megatron.reshard import reshard

    _check_dtype(args)
    _check_destination(args)
    reshard(
        args.source,
        args.destination,
        files=args.files,
        weights_only=args.weights_only,
        dtype=args.dtype,
        say=print,
        progress=not args.quiet,
        verify=args.verify,
    )
    return _wrote(args)


def _verify(args: argparse.Namespace) -> int:
    from megatron_mlra.checkpoint.verify import compare

    text = None if args.text is None else read_text(args.text, newline="")
    a, b = (_open(args, path, takes_ahead=False) for path in (args.a, args.b))
    compare.check_same_function(a, b)
    named = b if not a.tokenizer_files() and b.tokenizer_files() else a
    tokens, said = compare.sample_tokens(named, text, args.tokenizer, args.tokens, args.length)
    if args.transformers:
        result = compare.compare_with_transformers(a, b, tokens, args.tolerance)
    else:
        result = compare.compare(a, b, tokens, args.tolerance, progress=not args.quiet)
    print(f"{said}; {result}")
    return 0 if result.same else 1
