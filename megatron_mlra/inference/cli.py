"""Command line of text generation: one process, or one a GPU under torchrun."""

# ruff: noqa: E402  (the environment must be set before torch is imported)

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator

from megatron_mlra.command_line.threads import wait_passively

wait_passively()

import torch

from megatron_mlra.checkpoint.folder import CheckpointFolder
from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.checkpoint.tokenizer import checkpoint_tokenizer, stop_ids
from megatron_mlra.command_line.parser import one_line, write_text
from megatron_mlra.command_line.progress_bar import bar
from megatron_mlra.command_line.results import check_json
from megatron_mlra.data.tokenizers import Tokenizer
from megatron_mlra.fault_tolerance import fingerprint
from megatron_mlra.fault_tolerance.handshake import Fingerprint
from megatron_mlra.inference import world
from megatron_mlra.inference.engine import Engine
from megatron_mlra.inference.flags import check, parser, read_prompts
from megatron_mlra.inference.growing_text import GrowingText
from megatron_mlra.inference.load import LoadOptions, load_draft, load_model
from megatron_mlra.inference.parallel import TensorParallel, tensor_parallel_size
from megatron_mlra.inference.request import Request
from megatron_mlra.inference.runner import Runner
from megatron_mlra.inference.sampling import SEEDS, SamplingParams
from megatron_mlra.inference.world import Once

_ON_CPU = "DefaultCPUAllocator: "
"""In torch's error on memory that a CPU has not: a RuntimeError without a type of its own."""


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        # Read once, since a file may be a pipe.
        prompts = Once(lambda: read_prompts(args))
        with _world(args, prompts) as device:
            return _generate(args, prompts(), world.rank(), device)
    except (ValueError, OSError) as error:
        return world.refuse(error)
    except RuntimeError as error:
        text = str(error).splitlines()[0].rpartition(_ON_CPU)[2]
        if not (isinstance(error, torch.cuda.OutOfMemoryError) or _ON_CPU in str(error)):
            raise
        print(f"error: {one_line(text)}; use --cache-tokens", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if world.rank() == 0:
            print("\nerror: interrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _world(args: argparse.Namespace, prompts: Once[list[str]]) -> Iterator[str]:
    """Yields the device of this process, inside torchrun's process group if there is one."""
    kind = Once(lambda: _device(args))

    def told() -> Fingerprint:
        return {
            "device": {"the device": kind.text()},
            "arguments": fingerprint.of_arguments(args, positional=("checkpoint",)),
            "prompts": {"the prompts": prompts.text()},
            **world.of_inputs(args.checkpoint, args.tokenizer_model),
        }

    met = world.meet(told)
    device = kind()
    if met is None:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    with world.formed(met, "nccl" if device.startswith("cuda") else "gloo"):
        yield device


def _device(args: argparse.Namespace) -> str:
    """`cpu` or `cuda`.

    Raises:
        ValueError: there is no GPU, and one is asked for.
    """
    there = torch.cuda.is_available()
    if args.device == "cuda" and not there:
        raise ValueError("--device cuda: torch sees no GPU; use --device cpu")
    return ("cuda" if there else "cpu") if args.device == "auto" else args.device


def _generate(args: argparse.Namespace, texts: list[str], rank: int, device: str) -> int:
    last = SEEDS[1] - len(texts) + 1
    if args.seed > last:
        raise ValueError(
            f"--seed {args.seed} leaves none for the last of {len(texts)} prompts; use at most"
            f" {last}"
        )
    params = [
        SamplingParams(
            max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
            top_p=args.top_p, seed=args.seed + i, stop=tuple(args.stop), logprobs=args.logprobs,
        )
        for i in range(len(texts))
    ]  # fmt: skip
    check(args)
    tensor_parallel_size(world.size(), args.context_parallel)
    if args.output:
        check_json(args.output, "--output")
    folder = open_checkpoint(args.checkpoint, args.vocab_size, verify=args.verify)
    if args.speculate and not folder.description.mtp_num_layers:
        raise ValueError(
            f"--speculate needs a layer of multi-token prediction, and {args.checkpoint} has none;"
            " leave it out, or train with --mtp-num-layers 1"
        )
    tokenizer = checkpoint_tokenizer(folder, args.tokenizer, args.tokenizer_model)
    if not args.ignore_eod:
        ends = (tokenizer.eod, *stop_ids(folder))
        params = [SamplingParams(**{**vars(p), "stop_ids": ends}) for p in params]
    # An empty prompt starts where a document starts: behind the end of another one.
    prompts = [tokenizer.tokenize(text) or [tokenizer.eod] for text in texts]
    context = (
        args.context if args.context is not None else folder.description.max_position_embeddings
    )
    longest = max(map(len, prompts)) + args.max_new_tokens
    if longest > context:
        raise ValueError(
            f"the longest prompt and --max-new-tokens make {longest} tokens, more than the context"
            f" of {context}; shorten them or set --context {longest} (untrained positions)"
        )
    engine = _engine(args, folder, prompts, tokenizer, rank, device)
    start = time.monotonic()
    requests = [engine.submit(p, s) for p, s in zip(prompts, params, strict=True)]
    _stream(engine, requests, texts, tokenizer, quiet=rank > 0)
    if rank == 0:
        _report(engine, requests, time.monotonic() - start)
        if args.output:
            _write(args.output, requests, texts)
    failed = [request for request in requests if request.finish_reason == "error"]
    if rank == 0:
        for request in failed:
            print(f"error: prompt {request.id + 1}: {one_line(request.error)}", file=sys.stderr)
    return 1 if failed else 0


def _engine(
    args: argparse.Namespace,
    folder: CheckpointFolder,
    prompts: list[list[int]],
    tokenizer: Tokenizer,
    rank: int,
    device: str,
) -> Engine:
    model, parallel = folder.description, None
    if torch.distributed.is_initialized():
        parallel = TensorParallel.over_world(model, args.context_parallel)
    needs = sorted((len(p) + args.max_new_tokens for p in prompts), reverse=True)
    page = max(args.page_size, 1)
    together = min(args.max_batch, len(prompts))
    # Whole pages on every rank: the sequences fit, whichever rank each one begins on.
    unit = page * max(args.context_parallel, 1)
    tokens = sum(-(-n // unit) * unit for n in needs[:together])
    if args.cache_tokens is not None and args.cache_tokens < needs[0] - 1:
        raise ValueError(
            f"--cache-tokens is {args.cache_tokens} and the longest prompt with its output takes"
            f" {needs[0] - 1}; use at least that"
        )
    options = LoadOptions(
        dtype=args.dtype, cache_dtype=args.cache_dtype, page_size=args.page_size,
        cache_tokens=tokens if args.cache_tokens is None else args.cache_tokens,
        max_positions=args.context, backend=args.backend, weight_mode=args.weight_mode,
        draft=args.speculate, all_reduce=args.all_reduce,
    )  # fmt: skip

    def progress(layers: range):
        return bar(layers, desc="loading", unit="layers", shown=not rank)

    loaded = load_model(model, folder.tensor, options, device, parallel, progress)
    if rank == 0:
        where = f"{device.partition(':')[0]}, {str(loaded.weights.embedding.dtype)[6:]}"
        size = "" if parallel is None else f", tensor parallel {parallel.size} ({args.weight_mode})"
        if args.context_parallel > 1:
            size += f", context parallel {args.context_parallel}"
        if parallel is not None:
            size += f", all-reduce {loaded.reduction.path}"
        print(f"{model.variant}, {where}, backend {loaded.ops.name}{size}", file=sys.stderr)
    draft = load_draft(loaded, folder.tensor, args.weight_mode) if args.speculate else None
    graphs = loaded.ops.name == "mlra_kernels" and not args.no_graphs
    runner = Runner(loaded, together, -(-needs[0] // page), graphs=graphs)
    return Engine(runner, args.chunk_size, tokenizer.detokenize, draft=draft)


def _stream(
    engine: Engine, requests: list[Request], texts: list[str], tokenizer: Tokenizer, quiet: bool
) -> None:
    """Print one prompt's output token by token, several prompts' outputs as each completes."""
    single = requests[0] if len(requests) == 1 and not requests[0].params.stop else None
    growing = GrowingText(tokenizer.detokenize)
    if single is not None and not quiet:
        print(texts[0], end="", flush=True)
    for request in engine.run():
        if quiet:
            continue
        done = request.finish_reason is not None
        if single is not None:
            text = ""
            # The engine detokenizes the whole output at its end and reports a failure then.
            with contextlib.suppress(Exception):
                text = growing.more(request.output, done)
            print(text, end="\n" if done else "", flush=True)
        elif done:
            title = f"[{request.id}] " if len(requests) > 1 else ""
            print(f"{title}{texts[request.id]}{request.text}", flush=True)


def _report(engine: Engine, requests: list[Request], seconds: float) -> None:
    tokens = sum(len(r.output) for r in requests)
    first = sorted(r.first_token - r.submitted for r in requests if r.first_token is not None)
    gaps = [
        (r.last_token - r.first_token) / (len(r.output) - 1) for r in requests if len(r.output) > 1
    ]
    cache, context = engine.runner.model.cache, engine.runner.model.parallel.context
    a_token = f", {1e3 * sum(gaps) / len(gaps):.1f} ms per token of a request" if gaps else ""
    guesses, speculation = "", engine.speculation
    if speculation is not None and speculation.guessed:
        share = speculation.right / speculation.guessed
        guesses = f"; {speculation.right} of {speculation.guessed} guesses right ({share:.0%})"
    wait = f" first token after {1e3 * first[len(first) // 2]:.0f} ms (median);" if first else ""
    print(
        f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s{a_token};"
        f"{wait} {cache.bytes_per_token // context:,} KV bytes per token and rank in"
        f" {cache.dtype_name}, {cache.allocated_bytes:,} allocated{guesses}",
        file=sys.stderr,
    )


def _write(file: str, requests: list[Request], texts: list[str]) -> None:
    lines = []
    for request, text in zip(requests, texts, strict=True):
        record = {
            "prompt": text, "output": request.text, "finish_reason": request.finish_reason,
            "tokens": request.output,
        }  # fmt: skip
        if request.params.logprobs:
            record["logprobs"] = request.logprobs
        if request.error is not None:
            record["error"] = request.error
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_text(file, "".join(lines))
