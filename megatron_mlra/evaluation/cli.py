"""Command line of `mlra evaluate`: loss on datasets, perplexity of texts, accuracy on tasks."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_mlra.checkpoint.files.tracker import a_checkpoint
from megatron_mlra.command_line import parser as command_line
from megatron_mlra.command_line.early import a_file, reads, writes
from megatron_mlra.command_line.numbers import whole
from megatron_mlra.command_line.parser import OneLineParser
from megatron_mlra.command_line.results import check_json
from megatron_mlra.data.prefixes import a_dataset
from megatron_mlra.description.model import DTYPES
from megatron_mlra.evaluation.inputs import add_inputs, check_tokens, read_inputs, run
from megatron_mlra.evaluation.tasks import read_task, run_task, told

WINDOWS = 64
"""Of each dataset, by default, for --cache-dtype: decoding takes a step per token."""


def parser() -> OneLineParser:
    """The flags."""
    command = OneLineParser(
        description="Loss and perplexity of a checkpoint on texts and datasets, and its accuracy on"
        " tasks.",
        epilog="example: mlra evaluate runs/my --text book.txt --data valid=data/valid",
    )
    reads(
        command.add_argument(
            "checkpoint", help="a run's --save folder, its iter_* folder, or an exported folder"
        ),
        a_checkpoint,
    )
    add_inputs(command)
    data = command.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="NAME=PREFIX",
        help="datasets of `mlra preprocess`, each with a name for the report: the loss that"
        " training's"
        " --held-out reports",
    )
    reads(data, a_dataset)
    task = command.add_argument(
        *("--task", "--tasks"),
        dest="task",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of JSON lines: {context, choices, answer}, {context, continuation}, or as"
        " ARC's",
    )
    reads(task, a_file)
    command.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; default: as they are stored"
    )
    command.add_argument(
        "--batch-size", type=whole(1), default=8, help="sequences per forward pass (default: 8)"
    )
    command.add_argument(
        "--max-length", type=whole(1), help="tokens per window; default: the model's"
    )
    command.add_argument(
        *("--cache-dtype", "--cache-dtypes"),
        dest="cache_dtype",
        nargs="+",
        default=[],
        choices=(*DTYPES, "fp8", "fp8-rope"),
        metavar="DTYPE",
        help="decode half of each window of --data from caches of these dtypes, and compare their"
        " losses and logits with the first's: float32 bfloat16 fp8; fp8-rope simulates RoPE keys in"
        " FP8 too, which nothing serves",
    )
    command.add_argument(
        "--windows",
        type=whole(1),
        default=WINDOWS,
        help=f"windows of each dataset for --cache-dtype (default: {WINDOWS})",
    )
    json_file = command.add_argument("--json", metavar="FILE", help="write the results here too")
    writes(json_file, check_json)
    command.together.append(_check)
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for wrong input."""
    return run(parser(), _run, argv)


def _check(args: argparse.Namespace) -> None:
    """Check the flags against each other, before any file is read.

    Raises:
        ValueError: names the flag and the fix.
    """
    if args.cache_dtype and (args.text or args.task or not args.data):
        raise ValueError("--cache-dtype needs --data NAME=PREFIX; leave --text and --task out")
    if not args.text and not args.task and not args.data:
        raise ValueError("nothing to evaluate; give --text, --data or --task")
    if args.windows != WINDOWS and not args.cache_dtype:
        raise ValueError(f"--windows {args.windows} is of --cache-dtype; leave it out, or add that")
    if args.cache_dtype and args.dtype and not {"fp8", "fp8-rope"} & set(args.cache_dtype):
        raise ValueError(
            f"--dtype {args.dtype} is of the weights beside an FP8 cache, and --cache-dtype names"
            " none; leave it out"
        )


def _run(args: argparse.Namespace) -> None:
    _check(args)
    if args.json:
        check_json(args.json, "--json")
    texts, streams = read_inputs(args)
    tasks = {file: read_task(file) for file in args.task}

    results = _decoded(args, streams) if args.cache_dtype else _scored(args, texts, streams, tasks)
    if args.json:
        command_line.write_json(args.json, results, indent=2)


def _scored(
    args: argparse.Namespace,
    texts: dict[str, str],
    streams: dict[str, np.ndarray],
    tasks: dict[str, list],
) -> dict[str, Any]:
    """Scores of whole windows by transformers; told on the way."""
    from megatron_mlra.evaluation.models import load_scorer

    scorer = load_scorer(
        args.checkpoint,
        dtype=args.dtype,
        device=args.device,
        tokenizer=args.tokenizer,
        batch_size=args.batch_size,
        progress=True,
        verify=args.verify,
    )
    if args.max_length is not None:
        scorer.max_length = args.max_length
    results: dict[str, Any] = {"checkpoint": args.checkpoint, "text": {}, "data": {}, "task": {}}
    for file, text in texts.items():
        (score,) = scorer.texts([text])
        check_tokens(file, score.num_tokens)
        found = results["text"][file] = perplexity(score, text)
        loss = -found["log_likelihood"] / found["tokens"]
        print(row(file, loss, f"{found['bits_per_byte']:.4f} bits per byte", found["tokens"]))
    for name, tokens in streams.items():
        found = results["data"][name] = stream_loss(scorer, tokens, name)
        print(row(name, found["loss"], "", found["tokens"]))
    for file, items in tasks.items():
        found = results["task"][file] = run_task(scorer, items)
        print("\n".join(told(file, found)))
    return results


def _decoded(args: argparse.Namespace, streams: dict[str, np.ndarray]) -> dict[str, Any]:
    """Per set and cache dtype, what decoded.py tells; a table on the way."""
    from megatron_mlra.checkpoint.formats import open_checkpoint
    from megatron_mlra.evaluation.decoded import chosen_windows, decoded_losses, load_runners
    from megatron_mlra.evaluation.models import check_device

    device = check_device(args.device, args.dtype)
    source = open_checkpoint(args.checkpoint, verify=args.verify)
    length = args.max_length or source.description.max_position_embeddings
    rows = {}
    for name, tokens in streams.items():
        check_ids(tokens, name, source.description.vocab_size)
        rows[name] = chosen_windows(tokens, length, args.windows, f"--data {name}")
    batch = min(args.batch_size, max(map(len, rows.values())))
    runners = load_runners(source, args.cache_dtype, args.dtype, device, batch, length)
    results: dict[str, Any] = {"checkpoint": args.checkpoint, "decoded": {}}
    for name, windows in rows.items():
        results["decoded"][name] = decoded_losses(runners, windows, progress=True)
        for dtype, found in results["decoded"][name].items():
            apart = (
                f"logits off {args.cache_dtype[0]}'s by {found['rms_logit_error']:.1e} (root mean"
                f" square), {found['max_logit_error']:.1e} (largest)"
            )
            more = "" if dtype == args.cache_dtype[0] else apart
            print(row(f"{name}, cache in {dtype}", found["loss"], more, found["tokens"]))
    return results


def row(name: str, loss: float, more: str, tokens: int) -> str:
    """The line of a result: `books: loss 2.5020 nats per token (perplexity 12.21), 14,373 tokens`.

    Args:
        loss: in nats per token.
        more: what else there is to say; may be empty.
    """
    perplexity_of_it = math.inf if loss > 700 else math.exp(loss)  # exp fails beyond 709
    said = f"{name}: loss {loss:.4f} nats per token (perplexity {perplexity_of_it:.2f})"
    return ", ".join((said, *([more] if more else []), f"{tokens:,} tokens"))


def perplexity(score: Any, text: str) -> dict[str, float]:
    """Perplexity exp(-log-likelihood / tokens), at most exp(700), and bits per byte
    -log2-likelihood / bytes of a text with a Score."""
    num_bytes = len(text.encode("utf-8"))
    return {
        "log_likelihood": score.log_likelihood,
        "perplexity": math.exp(min(-score.log_likelihood / score.num_tokens, 700.0)),
        "bits_per_byte": -score.log_likelihood / num_bytes / math.log(2),
        "tokens": score.num_tokens,
        "bytes": num_bytes,
    }


def stream_loss(scorer: Any, tokens: np.ndarray, name: str) -> dict[str, float]:
    """Loss of a dataset in nats per token, and its number of tokens.

    Raises:
        ValueError: the dataset has ids beyond the model's vocabulary.
    """
    check_ids(tokens, name, scorer.vocab_size)
    score = scorer.stream(tokens, scorer.prefix_id)
    return {"loss": -score.log_likelihood / score.num_tokens, "tokens": score.num_tokens}


def check_ids(tokens: np.ndarray, name: str, vocab_size: int | None) -> None:
    """Refuse a dataset with ids that the model has not.

    Raises:
        ValueError: names the dataset, its largest id and the model's vocabulary.
    """
    if vocab_size is not None and int(tokens.max()) >= vocab_size:
        raise ValueError(
            f"--data {name} holds token {int(tokens.max())} and the model has {vocab_size};"
            " give data made with the model's tokenizer"
        )
