"""The lines that a person reads: a summary, an error. Megatron's output goes to a log."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import re
import stat
import sys
import threading
import traceback
from argparse import Namespace
from pathlib import Path

import torch
from megatron.training import get_tensorboard_writer, get_wandb_writer
from tqdm import tqdm

from megatron_mlra.command_line.parser import one_line
from megatron_mlra.command_line.ranks import say_refusal, tell_launcher
from megatron_mlra.cost.alignment import unaligned_mlps
from megatron_mlra.cost.cache import kv_cache_text
from megatron_mlra.cost.parameters import parameters
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.training import batch_schedule
from megatron_mlra.training.ending import kill_children
from megatron_mlra.training.muon import OptimizerRefused


def summary(args: Namespace, shape: ModelDescription) -> str:
    """What is trained, one fact a line: the model, steps and tokens, processes, KV cache, and
    that nothing is saved where nothing is."""
    steps = batch_schedule.steps(args) or args.train_iters
    steps = steps or (args.train_samples or 0) // args.global_batch_size
    (least, size), length = batch_schedule.sizes(args), args.seq_length
    rising = least != size
    samples = f"{size:,} {'sequence' if size == 1 else 'sequences'} of {length:,}"
    samples = f"{least:,} to {samples}" if rising else samples
    tokens = f"{least * length:,} to {size * length:,}" if rising else f"{size * length:,}"
    packed = ", documents packed" if args.dataloader_inter_document_masking else ""
    cached = kv_cache_text(shape, args.tensor_model_parallel_size)
    note = mlp_note(args, shape)
    return "\n".join(
        (
            f"training {shape.attention_variant}: {parameters(shape).total:,} parameters",
            f"  length: {steps:,} steps of {tokens} tokens ({samples}{packed})",
            f"  processes: {_processes(args)}",
            f"  when it generates: {cached}",
            *([note] if note else []),
            *([] if args.save or args.dry_run else ["  saved: nothing, since there is no --save"]),
        )
    )


def mlp_note(args: Namespace, shape: ModelDescription) -> str:
    """A line on MLP sizes that tensor-parallel ranks of GPUs multiply slowly; mostly empty."""
    if not (args.dry_run or torch.cuda.is_available()) or not (args.bf16 or args.fp16):
        return ""
    return unaligned_mlps(shape, args.tensor_model_parallel_size, args.expert_tensor_parallel_size)


def _processes(args: Namespace) -> str:
    """How many processes there are, and what each way of sharing work takes of them."""
    if args.world_size == 1:
        return "1"
    ways = [
        (args.tensor_model_parallel_size, "each layer cut over", "TP"),
        (args.context_parallel_size, "each sequence cut over", "CP"),
        (args.pipeline_model_parallel_size, "the layers in a row over", "PP"),
        (args.data_parallel_size, "the batch shared by", "DP"),
    ]
    said = [f"{what} {count} ({short}{count})" for count, what, short in ways if count > 1]
    if args.attention == "mlra" and args.tensor_model_parallel_size > 1:
        said.append(f"{args.latent_tp_layout} layout")
    if args.sequence_parallel:
        said.append("sequence parallel")
    return f"{args.world_size:,}: {', '.join(said)}"


def on_cpu(args: Namespace) -> str:
    """One line: that there is no GPU, and a warning where the CPU is slow in bf16."""
    line = "no GPU found: training on the CPU, for small models and trials"
    if args.bf16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # A product of [128, 4096] and [4096, 1024] by AVX2: 2.0 s in bf16, 0.02 s in float32.
        line += "; it has no bf16 instructions, so products take up to 100 times as long as in"
        line += " float32: try --no-bf16"
    return line


def accelerated_parts(args: Namespace) -> str:
    """Of a run on GPUs: which optional accelerators run, and what a missing one costs."""
    installed = importlib.util.find_spec("transformer_engine") is not None
    if args.transformer_impl == "transformer_engine":
        te = "yes"
    elif installed:
        te = "installed, not chosen (--transformer-impl local)"
    else:
        te = "no: no FP8, no fused norms, attention by torch (pip install 'megatron-mlra[te]')"
    fused = "yes" if args.gradient_accumulation_fusion else "no: in a pass of their own"
    triton = "yes" if importlib.util.find_spec("triton") else "no: decoding runs on torch"
    return "\n".join(
        (
            "accelerated parts:",
            f"  Transformer Engine: {te}",
            f"  weight gradients summed in their products: {fused}",
            f"  Triton: {triton}",
        )
    )


class MegatronOutput(io.TextIOBase):
    """Takes the output of stdout, library logging and the tracebacks of threads.

    Output is kept in memory until the run has a log, so that a refused run leaves nothing behind.
    Rank 0 and the last rank write a log; the output of other ranks is dropped.

    Attributes:
        path: of the log, or of the file for this rank's error; None until `open`.
        last_line: the last line of output. Where Megatron ends the process without an error, this
            line gives the reason.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.path: Path | None = None
        self.last_line = ""
        self._rank, self._last_rank = rank, world_size - 1
        self._held: list[str] = []
        self._file: io.TextIOBase | None = None
        sys.stdout = self
        logging.basicConfig(stream=self, level=logging.INFO, force=True)
        threading.excepthook = lambda hook: self.write(
            "".join(traceback.format_exception(hook.exc_type, hook.exc_value, hook.exc_traceback))
        )

    def open(self, folder: Path) -> None:
        """Write the kept output, and all later output, to a log in `folder`.

        Raises:
            ValueError: the log's path is no plain file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        names = {self._last_rank: "megatron-last-rank.log", 0: "megatron.log"}
        if name := names.get(self._rank):
            self.path = folder / name
            self._file = _append(self.path)
            self._file.write("".join(self._held))
        else:
            self.path = folder / f"error-rank-{self._rank}.log"
            self._file = open(os.devnull, "w")  # noqa: SIM115
        self._held.clear()

    def write(self, text: str) -> int:
        """Keep or log `text`. A log that cannot be written (a full disk) does not end the run."""
        if text.strip():
            self.last_line = text.strip().splitlines()[-1]
        if self._file is None:
            self._held.append(text)
        else:
            with contextlib.suppress(OSError):
                self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Nothing is buffered: the file writes every line at once."""


def _append(path: Path) -> io.TextIOBase:
    """Open a log to append to it, line by line.

    Raises:
        ValueError: `path` is a link, a folder or a pipe. The target of a link is not touched.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError(f"the log {path} is no plain file; remove it, or use another --save")
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    return open(
        path, "a", buffering=1, opener=lambda name, mode: os.open(name, mode | flags, 0o666)
    )


def fail(error: BaseException, output: MegatronOutput | None, started: bool) -> int:
    """Print one line for an error that ends the run; of a started run, log the traceback.

    Args:
        output: holds the log; None with --verbose-megatron, which prints the traceback instead.
        started: whether the ranks have met, so that the error is not about the command line.

    Returns:
        the exit code: 2 for a run that did not start or whose optimizer refused its flags, 1 for a
        run that failed later.
    """
    if isinstance(error, SystemExit):
        error = RuntimeError(f"Megatron ended the run: {output.last_line if output else error}")
    if isinstance(error, OptimizerRefused):
        started = False  # as for any refused flag: all ranks meet the error, one per host prints it
    if not started:
        say_refusal(message(error))
        return 2
    tell_launcher(message(error))
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    where = f" (rank {os.environ.get('RANK', '?')})" if many else ""
    tqdm.write(f"error{where}: {message(error)}", file=sys.stderr)
    if output is None:  # --verbose-megatron
        traceback.print_exception(error)
    elif output.path is not None:
        try:
            with _append(output.path) as file:
                traceback.print_exception(error, file=file)
        except (OSError, ValueError):
            pass
        else:
            print(f"  full log: {output.path}", file=sys.stderr)
    sys.stderr.flush()
    return 1


def fail_run(
    error: BaseException, args: Namespace | None, output: MegatronOutput | None, started: bool
) -> int:
    """Call `fail`, write out the curves, and end child processes; returns the exit code."""
    if isinstance(error, SystemExit):
        code = fail(error, output, started)
    else:
        if started and args.save and not os.path.isdir(args.save):
            error = _save_is_gone(args, error)
        code = fail(error, output, started)
        # After the error's line: writing the curves fails too where the folder is broken.
        with contextlib.suppress(Exception):
            if writer := get_tensorboard_writer():
                writer.flush()
            if online := get_wandb_writer():
                online.finish(exit_code=code)
    kill_children()
    return code


def _save_is_gone(args: Namespace, error: BaseException) -> RuntimeError:
    """The error of a run whose folder was deleted, or unmounted, while it ran."""
    step = getattr(args, "curr_iteration", 0) + 1
    gone = RuntimeError(
        f"--save {args.save} is gone (deleted, or unmounted) at step {step:,}: its checkpoints are"
        f" lost with it ({' '.join(str(error).split())})"
    )
    gone.__cause__ = error
    return gone


def message(error: BaseException) -> str:
    """The text of any error, in one line."""
    text = one_line(error)
    if re.search(r"Connection refused.*\[?127\.|connect.*\[?127\..*refused", text, re.I):
        return (
            "another rank gave its address as 127.*, which only its own host reaches: set"
            " GLOO_SOCKET_IFNAME to the interface that the hosts share, or LOCAL_ADDR"
        )
    if re.search(r"Connection (closed by peer|reset)|Broken pipe|gloo.*timed? ?out", text, re.I):
        peer = re.search(r"\[(?:::ffff:)?([0-9a-f.:]+)\]:\d+", text)
        where = f" (at {peer[1]})" if peer else ""
        return f"another rank{where} is gone; its own error, or the launcher, says why"
    if not text:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        return f"{type(error).__name__} at `{line}`"
    if isinstance(error, ValueError | AssertionError | RuntimeError | OSError):
        return text
    return f"{type(error).__name__}: {text}"
