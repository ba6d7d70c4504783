"""What a person sees of a run: a summary, progress, one line for an error. Megatron's own output goes to
a log file."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_mlra.accounting import (
    ModelShape,
    kv_cache_bytes_per_token,
    parameters,
    train_flops_per_token,
)


def say(line: str) -> None:
    """Print a line for a person, past the redirection of Megatron's output."""
    tqdm.write(line, file=sys.__stdout__)
    sys.__stdout__.flush()


def summary(args: Namespace, shape: ModelShape) -> str:
    """One line: what is trained, its size, its KV cache and the parallel layout."""
    weight_bytes = 2 if args.bf16 or args.fp16 else 4
    tp = args.tensor_model_parallel_size
    layout = f"TP{tp} x PP{args.pipeline_model_parallel_size} x DP{args.data_parallel_size}"
    if args.attention == "mlra" and tp > 1:
        layout += f", {args.latent_tp_layout} layout"
    if args.sequence_parallel:
        layout += ", sequence parallel"
    total = parameters(shape).total
    cache = kv_cache_bytes_per_token(shape, dtype_bytes=weight_bytes)
    per_rank = kv_cache_bytes_per_token(shape, tp=tp, dtype_bytes=weight_bytes)
    kv = f"{cache:,} KV bytes a token" + (f" ({per_rank:,} a TP rank)" if tp > 1 else "")
    steps = args.train_iters or 0
    tokens = args.global_batch_size * args.seq_length
    return (
        f"training {shape.variant}: {total:,} parameters, {kv}, {layout},"
        f" {steps:,} steps of {tokens:,} tokens"
    )


def accelerated_parts(args: Namespace) -> str:
    """One line: which optional accelerators run, and what a missing one costs."""

    def has(name: str) -> bool:
        return importlib.util.find_spec(name) is not None

    te = args.transformer_impl == "transformer_engine"
    if te:
        te_note = "Transformer Engine yes"
    elif has("transformer_engine"):
        te_note = "Transformer Engine installed, not chosen (--transformer-impl local)"
    else:
        te_note = "Transformer Engine no (without it: no FP8, no fused norms, attention by torch)"
    if args.gradient_accumulation_fusion:
        apex_note = "APEX yes"
    else:
        apex_note = "APEX no (weight gradients are accumulated in a pass of their own)"
    triton_note = "Triton yes" if has("triton") else "Triton no (decoding runs its torch reference)"
    return f"accelerated parts: {te_note}; {apex_note}; {triton_note}"


def redirect_megatron(args: Namespace, folder: Path) -> Path | None:
    """Send what Megatron prints to `folder/megatron.log` (rank 0 and the last rank), others' to nothing.

    Returns:
        the log's path on the ranks that write one.
    """
    if args.verbose_megatron:
        return None
    names = {args.world_size - 1: "megatron-last-rank.log", 0: "megatron.log"}
    name = names.get(args.rank)
    path = Path(os.devnull) if name is None else folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = open(path, "a", buffering=1)  # noqa: SIM115  (open for the life of the process)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, force=True)
    return None if name is None else path


class Progress:
    """Progress lines in place of Megatron's log lines, and FLOPs that know branches.

    Wraps four functions of Megatron's trainer, which has no hooks at these points.
    """

    def __init__(self, args: Namespace, shape: ModelShape) -> None:
        self.args = args
        self.speaks = args.rank == args.world_size - 1
        recompute = {"full": "full"}.get(args.recompute_granularity)
        if args.recompute_granularity == "selective":
            modules = args.recompute_modules or ["core_attn"]
            recompute = (
                "core"
                if "core_attn" in modules
                else "up_proj"
                if "mla_up_proj" in modules
                else None
            )
        self.model_flops, self.hardware_flops = train_flops_per_token(
            shape, args.seq_length, recompute=recompute
        )
        self.tokens_per_step = args.global_batch_size * args.seq_length
        self.last: tuple[int, float] | None = None
        self.bar: tqdm | None = None

    def install(self) -> None:
        """Put the wrappers in place."""
        from megatron.training import training

        training.num_floating_point_operations = self._flops
        training.report_theoretical_memory = lambda *_, **__: None
        training.training_log = self._wrap_log(training.training_log)
        training.evaluate = self._wrap_evaluate(training.evaluate)
        training.save_checkpoint = self._wrap_save(training.save_checkpoint)

    def _flops(self, args: Namespace, batch_size: int, *_, **__) -> float:
        """Model FLOPs of one global batch: the method's, whatever form computes it."""
        return self.model_flops * batch_size * args.seq_length

    def _wrap_log(self, training_log: Callable) -> Callable:
        def log(
            losses,
            totals,
            learning_rate,
            iteration,
            loss_scale,
            memory,
            skipped,
            grad_norm,
            *a,
            **k,
        ):
            flag = training_log(
                losses,
                totals,
                learning_rate,
                iteration,
                loss_scale,
                memory,
                skipped,
                grad_norm,
                *a,
                **k,
            )
            if self.speaks:
                self._step(losses, learning_rate, iteration, grad_norm)
            return flag

        return log

    def _step(self, losses: dict, learning_rate: float, iteration: int, grad_norm: float) -> None:
        args, now = self.args, time.time()
        if self.bar is None and sys.__stdout__.isatty():
            self.bar = tqdm(
                total=args.train_iters, initial=iteration - 1, unit="step", file=sys.__stdout__
            )
        if self.bar is not None:
            self.bar.update(iteration - self.bar.n)
        if self.last is None:
            self.last = (iteration, now)
        if iteration % args.log_interval and iteration != args.train_iters:
            return
        parts = [f"step {iteration:,}/{args.train_iters:,}"]
        parts += [f"{name} {_value(loss):.4f}" for name, loss in losses.items()]
        if grad_norm is not None:
            parts.append(f"grad norm {float(grad_norm):.3f}")
        if learning_rate is not None:
            parts.append(f"lr {learning_rate:.2e}")
        steps, seconds = iteration - self.last[0], now - self.last[1]
        if steps and seconds > 0:
            rate = steps * self.tokens_per_step / seconds
            model, hardware = (
                rate * flops / args.world_size / 1e12
                for flops in (self.model_flops, self.hardware_flops)
            )
            parts.append(f"{rate:,.0f} tokens/s")
            parts.append(f"TFLOP/s a device: model {model:.3g}, hardware {hardware:.3g}")
            self._write_rates(iteration, rate, model, hardware)
        self.last = (iteration, now)
        say(" | ".join(parts))

    def _write_rates(self, iteration: int, rate: float, model: float, hardware: float) -> None:
        from megatron.training import get_tensorboard_writer

        writer = get_tensorboard_writer()
        if writer:
            writer.add_scalar("tokens per second", rate, iteration)
            writer.add_scalar("model TFLOP per second and device", model, iteration)
            writer.add_scalar("hardware TFLOP per second and device", hardware, iteration)

    def _wrap_evaluate(self, evaluate: Callable) -> Callable:
        def run(*args, **kwargs):
            result = evaluate(*args, **kwargs)
            if self.speaks and result[0]:
                loss = ", ".join(
                    f"{name} {_value(value):.4f} (perplexity {math.exp(min(20, _value(value))):.2f})"
                    for name, value in result[0].items()
                )
                step = getattr(self.args, "curr_iteration", 0)
                say(f"validation at step {step:,}: {loss}")
            self.last = None
            return result

        return run

    def _wrap_save(self, save_checkpoint: Callable) -> Callable:
        def run(iteration, *args, **kwargs):
            start = time.time()
            result = save_checkpoint(iteration, *args, **kwargs)
            if self.speaks:
                verb = "saving" if self.args.async_save else "saved"
                say(f"{verb} step {iteration:,} to {self.args.save} ({time.time() - start:.1f} s)")
            self.last = None
            return result

        return run


def _value(loss) -> float:
    """A logged loss as a number: a tensor, or a (sum, count) pair."""
    loss = torch.as_tensor(loss).float().flatten()
    return (loss[0] / loss[1]).item() if loss.numel() == 2 else loss.item()


def fail(error: BaseException, log: Path | None) -> int:
    """One line for an error that ends the run; the traceback goes to the log.

    Returns:
        the exit code: 2 for what a user can put right before a run, 1 for what stopped one.
    """
    message = " ".join(str(error).split())
    if not message:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        message = f"{type(error).__name__} at `{line}`"
    rank = int(os.environ.get("RANK", "0"))
    where = f" (rank {rank})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    if not isinstance(error, ValueError | AssertionError | RuntimeError | OSError):
        message = f"{type(error).__name__}: {message}"
    print(f"error{where}: {message}", file=sys.stderr, flush=True)
    if log is not None:
        with open(log, "a") as file:
            traceback.print_exception(error, file=file)
        if not isinstance(error, ValueError):
            print(f"  full log: {log}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, ValueError | AssertionError) else 1
