"""The flags of `mlra generate`, and what of them is checked without torch."""

from __future__ import annotations

import argparse
from functools import partial

from megatron_mlra.checkpoint.files.tracker import a_checkpoint
from megatron_mlra.command_line.early import a_file, is_there, reads, writes
from megatron_mlra.command_line.foreign_text import parse_json
from megatron_mlra.command_line.numbers import real, whole
from megatron_mlra.command_line.parser import (
    OneLineParser,
    add_no_verify,
    check_output,
    lines_of,
)
from megatron_mlra.data.tokenizers import TOKENIZER_TYPES
from megatron_mlra.description.backends import (
    ALL_REDUCES,
    CACHE_DTYPES,
    DECODE_BACKENDS,
    LOAD_DTYPES,
    WEIGHT_MODES,
    check_page_size,
    current_name,
)

NO_PROMPT = "there is no prompt; use --prompt TEXT or --prompt-file FILE"


def parser() -> OneLineParser:
    """The flags."""
    p = OneLineParser(
        description="Continue prompts with a trained model (Megatron, exported or research folder)."
        " Under torchrun the model is cut over all processes.",
        epilog='example: mlra generate runs/my --prompt "Once upon" --temperature 0.7 --top-p 0.9',
    )
    reads(
        p.add_argument(
            "checkpoint", help="a run's --save folder, its iter_* folder, or an exported folder"
        ),
        a_checkpoint,
    )
    p.add_argument(
        "--prompt", action="append", default=[], help="text to continue; may be given several times"
    )
    files = p.add_argument(
        "--prompt-file", action="append", default=[],
        help="a file with a prompt per line; .jsonl: an object per line with `prompt` (or `text`)",
    )  # fmt: skip
    reads(files, a_file)
    p.add_argument(
        "--max-new-tokens", type=whole(1), default=128, help="longest output (default: 128)"
    )
    p.add_argument(
        "--temperature",
        type=real(0),
        default=0.0,
        help="randomness of the draws; 0 (default): always the likeliest",
    )
    p.add_argument(
        "--top-k", type=whole(0), default=0, help="draw from the K likeliest; default 0: all"
    )
    p.add_argument(
        "--top-p", type=real(above=0, most=1), default=1.0,
        help="draw from the likeliest that make up this probability; default: 1",
    )  # fmt: skip
    p.add_argument(
        "--seed",
        type=whole(-(2**63), 2**64 - 1),
        default=0,
        help="of the first prompt's draws (default: 0); each further prompt adds one",
    )
    p.add_argument(
        "--stop",
        action="append",
        default=[],
        help="text that ends an output; may be given several times",
    )
    p.add_argument(
        "--ignore-eod", action="store_true", help="do not stop where the model ends the document"
    )
    p.add_argument(
        "--logprobs",
        action="store_true",
        help="write the log-probability of every token into --output",
    )
    output = p.add_argument("--output", help="write prompts and outputs there, as JSON lines")
    writes(output, check_output)
    p.add_argument("--tokenizer", choices=TOKENIZER_TYPES,
                   help="kind of tokenizer; default: the checkpoint's own, or bytes for 257"
                   " tokens")  # fmt: skip
    p.add_argument("--tokenizer-model", help="its file, folder or name, as in `mlra preprocess`")
    p.add_argument(
        "--vocab-size", type=whole(1), help="true vocabulary, if a Megatron folder does not say it"
    )
    p.add_argument(
        "--max-batch",
        type=whole(1),
        default=32,
        help="most prompts that are run together (default: 32)",
    )
    p.add_argument(
        "--chunk-size",
        type=whole(1),
        default=2048,
        help="prompt tokens that are read in one step (default: 2048)",
    )
    p.add_argument(
        "--context", type=whole(1), help="longest prompt plus output; default: the model's"
    )
    p.add_argument(
        "--cache-tokens",
        type=whole(1),
        help="tokens that the KV cache holds; default: what --max-batch prompts need",
    )
    p.add_argument(
        "--page-size",
        type=whole(1),
        default=64,
        help="tokens of a page of the KV cache (default: 64)",
    )
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                   help="where to run; auto (default): a GPU where there is one")  # fmt: skip
    p.add_argument("--dtype", choices=LOAD_DTYPES, default="auto",
                   help="of the weights; auto (default): the checkpoint's, but float32 on a"
                   " CPU")  # fmt: skip
    p.add_argument(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        default="auto",
        help="of the KV cache; auto (default): --dtype",
    )
    p.add_argument(
        "--backend", type=partial(current_name, "backend"), choices=DECODE_BACKENDS, default="auto",
        help="code that attends; auto (default): mlra_kernels where they run, else torch",
    )  # fmt: skip
    p.add_argument(
        "--weight-mode", choices=WEIGHT_MODES, default="replicated",
        help="query and output projections over several processes: whole on each, or cut"
        " (default: replicated)",
    )  # fmt: skip
    p.add_argument(
        "--all-reduce", choices=ALL_REDUCES, default="auto",
        help="how processes add up a layer's outputs; auto (default): one-shot where GPUs write"
        " each other's memory and messages are small, else nccl",
    )  # fmt: skip
    p.add_argument(
        "--context-parallel", type=whole(1), default=1, metavar="N",
        help="cut the tokens of each sequence over N groups of the processes, and latents or heads"
        " within a group (default: 1)",
    )  # fmt: skip
    p.add_argument(
        "--speculate", action="store_true",
        help="guess a token per step by the run's layer of multi-token prediction: the same output",
    )  # fmt: skip
    add_no_verify(p)
    p.add_argument(
        "--no-graphs", action="store_true", help="do not record the decoding step as a CUDA graph"
    )
    p.together.append(check)
    return p


def check(args: argparse.Namespace) -> None:
    """Check the flags against each other.

    Raises:
        ValueError: names the flag and the fix.
    """
    if not args.prompt and not args.prompt_file:
        raise ValueError(NO_PROMPT)
    if args.tokenizer == "hf":
        if args.tokenizer_model is None:
            raise ValueError("the hf tokenizer needs --tokenizer-model")
        is_there(args.tokenizer_model, "--tokenizer-model", "tokenizer.json or its folder")
    for name in ("prompt", "stop"):
        for text in getattr(args, name):
            _check_text(f"--{name}", text)
    check_page_size(args.page_size)
    if args.logprobs and not args.output:
        raise ValueError("--logprobs writes into --output; add --output FILE, or leave it out")
    if args.speculate and args.context_parallel > 1:
        raise ValueError(
            f"--speculate needs whole sequences, and --context-parallel {args.context_parallel}"
            " cuts them; leave one of them out"
        )


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of --prompt and --prompt-file, in this order.

    Raises:
        ValueError: a file cannot be read, or there is no prompt.
    """
    texts = list(args.prompt)
    for name in args.prompt_file:
        for number, line in enumerate(lines_of(name), start=1):
            if not line.strip():
                continue
            is_json = name.lower().endswith(".jsonl")
            texts.append(_json_prompt(name, number, line) if is_json else line)
    if not texts:
        raise ValueError(NO_PROMPT)
    return texts


def _json_prompt(name: str, number: int, line: str) -> str:
    try:
        record = parse_json(line)
        text = record.get("prompt", record.get("text"))
    except (ValueError, AttributeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"{name}:{number}: not an object with `prompt` or `text`")
    _check_text(f"{name}:{number}:", text)
    return text


def _check_text(where: str, text: str) -> None:
    """Refuse what no tokenizer takes: bytes of the command line that are no UTF-8, and halves of a
    pair of surrogates in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} {text!r:.60} is no text in UTF-8") from None
