"""Progress of a run in lines (and on a terminal a bar): steps, validation, checkpoints, throughput.

`Progress.wrap_X` wraps Megatron's function X, so that lines are printed around its calls.
training/hooks.py puts the wrapped functions in place.
"""

from __future__ import annotations

import functools
import math
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable

import torch
from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
    FineGrainedActivationOffloadingInterface,
)
from megatron.training import async_utils, training
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from megatron_mlra.command_line.log_line import LogLine
from megatron_mlra.command_line.parser import say
from megatron_mlra.cost.flops import train_flops_per_token
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.fault_tolerance import failed_saves, stopping
from megatron_mlra.fault_tolerance.retention import prune
from megatron_mlra.fault_tolerance.saved_steps import latest_step, same_folder
from megatron_mlra.training import curves
from megatron_mlra.training.logits import LogitWatch
from megatron_mlra.training.speed import Clock, Speed, parts, peak_memory, speed


class Stopped(Exception):
    """Training ended early and in order, by a signal or by one of Megatron's --exit flags.

    Attributes:
        code: exit code of the process.
    """

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code


def resumed(args: Namespace) -> str:
    """The line of a resumed run: where it goes on, or that its last step is done and how to go on.

    Args:
        args: with `iteration`, the step of the checkpoint, and `train_iters`.
    """
    if not args.train_iters or args.iteration < args.train_iters:
        return f"continuing after step {args.iteration:,} of {args.load}"
    length = "--train-samples" if args.train_samples else "--train-iters"
    return (
        f"step {args.iteration:,} of {args.train_iters:,} is the end, and {args.load} has it; to"
        f" train on, give a larger {length} and --override-opt-param-scheduler"
    )


class Progress:
    """Prints progress in place of Megatron's log lines, and counts FLOPs with branches.

    Args:
        args: the run's arguments, validated.
        shape: the model's sizes.
    """

    def __init__(self, args: Namespace, shape: ModelDescription) -> None:
        self.args = args
        self.logits = LogitWatch(args)
        self.speaks = args.rank == args.world_size - 1
        self.token_flops = train_flops_per_token(shape, args.seq_length, recompute=recomputed(args))
        self.clock = Clock(args)
        self.line = LogLine()
        self.evaluating = ("validation", 0)
        self.validated: int | None = None
        self.losses: dict[str, list[torch.Tensor]] = {}
        self.saving: list[int] = []
        self.is_past_loop = False
        self.bar: tqdm | None = None

    @functools.cached_property
    def speed(self) -> Speed:
        """Converts token rates for this rank's device. Cached at the first logged step, since the
        device is not chosen earlier."""
        return speed(self.args, self.token_flops)

    def flops(self, args: Namespace, batch_size: int, *_, **__) -> float:
        """Model FLOPs of one global batch: the method's, not those of the core's chosen form."""
        return self.token_flops.model * batch_size * args.seq_length

    def wrap_log(self, training_log: Callable) -> Callable:
        """Wrap Megatron's `training_log`: print one line per logged step."""

        def log(losses, totals, rate, iteration, scale, memory, skipped, grad_norm, *rest, **named):
            flag = training_log(
                losses, totals, rate, iteration, scale, memory, skipped, grad_norm, *rest, **named
            )
            if self.speaks:
                for name, loss in losses.items() if not skipped else ():
                    self.losses.setdefault(name, []).append(loss)
                self._move_bar(iteration)
            if curves.is_logged(self.args, iteration):
                memory = peak_memory()
                if self.speaks:
                    self._step(rate, iteration, grad_norm, skipped, memory)
            elif self.clock.start is None:
                # The first step also compiles and allocates, so the clock starts after that step.
                torch.cuda.synchronize()
                self.clock.begin(iteration)
            return flag

        return log

    def wrap_multi_token(self, track: Callable) -> Callable:
        """Wrap Megatron's log of multi-token prediction: its losses join the run's line."""

        def log(scale, iteration, writer, wandb_writer=None, total_loss_dict=None):
            losses: dict[str, torch.Tensor] = {}
            track(scale, iteration, writer, wandb_writer, losses)
            for name, loss in losses.items():
                self.losses.setdefault(name, []).append(loss)
                if total_loss_dict is not None:
                    total_loss_dict[name] = total_loss_dict.get(name, 0.0) + loss

        return log

    def _step(
        self,
        learning_rate: float | None,
        iteration: int,
        grad_norm: float | None,
        skipped: int,
        memory: float,
    ) -> None:
        args = self.args
        last = f"{args.train_iters:,}"
        said = [f"step {iteration:,}/{last}"]
        # The mean over the steps since the previous line.
        means = {name: _mean(losses) for name, losses in self.losses.items()}
        means = {name: means[name] for name in sorted(means, key=lambda n: n.startswith("mtp"))}
        self.losses.clear()
        said += [f"{name} {mean:.4f}" for name, mean in means.items()]
        if skipped:
            said.append("skipped (overflow)")
        if grad_norm is not None:
            said.append("grad norm " + f"{float(grad_norm):#.3g}".removesuffix("."))
        if learning_rate is not None:
            said.append(f"lr {learning_rate:.2e}")
        torch.cuda.synchronize()
        rate = self.clock.rate(iteration)
        machine, points = parts(self.speed, rate, memory, self.clock.left(iteration))
        curves.record_losses(means, iteration, args.consumed_train_samples)
        curves.record(self.logits.points() | points, iteration)
        say(self.line(said, self.logits.said(), machine, growth=len(last) - len(f"{iteration:,}")))

    def _move_bar(self, iteration: int) -> None:
        if self.bar is None and sys.__stdout__.isatty():
            self.bar = tqdm(
                total=self.args.train_iters, initial=iteration - 1, unit="step", file=sys.__stdout__
            )
        if self.bar is not None:
            self.bar.update(iteration - self.bar.n)

    def wrap_results(self, evaluate_and_print_results: Callable) -> Callable:
        """Wrap Megatron's `evaluate_and_print_results`: test losses stay out of the validation
        curve, and no step is validated twice."""

        def run(prefix, forward_step, data, model, iteration, *rest, **named):
            is_test = "test set" in prefix
            self.evaluating = ("test" if is_test else "validation", iteration)
            if not is_test:
                if self.validated == iteration:
                    return None  # Megatron validates once more after the last step
                self.validated = iteration
            if is_test:
                # Megatron would write the test loss into the validation curve.
                named["write_to_tensorboard"] = False
            return evaluate_and_print_results(
                prefix, forward_step, data, model, iteration, *rest, **named
            )

        return run

    def wrap_evaluate(self, evaluate: Callable) -> Callable:
        """Wrap Megatron's `evaluate`: print a line of losses, and stop the clock meanwhile."""

        def run(*args, **named):
            with self.clock.pause():
                result = evaluate(*args, **named)
            if self.speaks and result[0]:
                losses = {name: _value(loss) for name, loss in result[0].items()}
                said = [
                    f"{name} {loss:.4f} (perplexity {math.exp(min(20, loss)):.2f})"
                    for name, loss in losses.items()
                ]
                what, step = self.evaluating
                say(f"{what} at step {step:,}: {', '.join(said)}")
                if what == "test":
                    curves.record({f"{name} test": loss for name, loss in losses.items()}, step)
            return result

        return run

    def _evaluate_first(
        self, forward_step, model, validation, process_non_loss, config, non_loss, **groups
    ) -> None:
        """Validate before the first step. The samples of this validation do not count as consumed,
        so that a checkpoint does not depend on --eval-at-start."""
        args = self.args
        consumed = args.consumed_valid_samples
        has_hooks = training.should_disable_forward_pre_hook(args)
        if has_hooks:
            training.disable_forward_pre_hook(model, param_sync=False)
        training.evaluate_and_print_results(
            f"iteration {args.iteration}",
            forward_step,
            validation,
            model,
            args.iteration,
            process_non_loss,
            config,
            verbose=False,
            write_to_tensorboard=True,
            non_loss_data_func=non_loss,
            **groups,
        )
        if has_hooks:
            training.enable_forward_pre_hook(model)
        if args.fine_grained_activation_offloading:
            # Megatron learns from the first pass which tensors to offload, and a validation pass
            # offloads none.
            FineGrainedActivationOffloadingInterface.reset_instance()
        args.consumed_valid_samples = consumed

    def wrap_train(self, train: Callable) -> Callable:
        """Wrap Megatron's `train`: validate first with --eval-at-start, and report an early end.

        The wrapped function raises `Stopped` where Megatron would exit.
        """

        def run(forward_step, model, optimizer, scheduler, data, validation, *rest, **named):
            if self.args.iteration and self.args.rank == 0:
                say(resumed(self.args))
            stop_if_asked()
            if self.args.eval_at_start and self.args.do_valid:
                process_non_loss, config, _, non_loss = rest[:4]
                groups = {k: named[k] for k in ("p2p_communicator", "pg_collection") if k in named}
                self._evaluate_first(
                    forward_step, model, validation, process_non_loss, config, non_loss, **groups
                )
            try:
                result = train(
                    forward_step, model, optimizer, scheduler, data, validation, *rest, **named
                )
                self.is_past_loop = True
            except SystemExit as stop:
                raise Stopped(self._why_stopped(), int(stop.code or 0)) from None
            finally:
                if self.bar is not None:
                    self.bar.close()
            return result

        return run

    def _why_stopped(self) -> str:
        args = self.args
        step = args.curr_iteration + 1
        why = f"stopped after step {step:,}"
        why += stopping.by()
        if not args.save:
            return f"{why}; nothing is saved without --save"
        if latest_step(args.save) != step:
            return why
        folder = shlex.quote(args.save)
        return f"{why}, which is saved; continue with --load {folder} --save {folder}"

    def wrap_finalize(self, maybe_finalize_async_save: Callable) -> Callable:
        """Wrap Megatron's `maybe_finalize_async_save`: errors name the step that is not saved. A
        writer that has ended is one, also between saves, while steps are left."""

        def run(blocking=False, **named):
            try:
                result = maybe_finalize_async_save(blocking, **named)
                if self.args.async_save and self.args.save and not blocking:
                    failed_saves.check()
            except (Exception, CheckpointException) as error:
                left = self._unfinalized()
                if process := failed_saves.ended():
                    raise failed_saves.without_helper(self.args, process, left) from error
                # A save that fails has left the queue. Later ones may still be in it.
                tried = self.saving[: len(self.saving) - len(left)]
                if not tried or tried[-1] == latest_step(self.args.save):
                    raise  # no save failed: another rank is gone, for example
                raise failed_saves.not_saved(self.args.save, tried[-1], error) from error
            self.saving = self._unfinalized()
            return result

        return run

    def _unfinalized(self) -> list[int]:
        """The steps of asynchronous saves that are not finalized, in order."""
        if not self.saving:
            return []
        count = async_utils._get_async_calls_queue().get_num_unfinalized_calls()
        return self.saving[len(self.saving) - count :]

    def wrap_save(self, save_checkpoint: Callable) -> Callable:
        """Wrap Megatron's `save_checkpoint`: print a line per save, and prune old checkpoints.

        At the end Megatron saves a step that is no multiple of --save-interval, also where no step
        was made. A checkpoint that this run has loaded is whole, and is not written over: it would
        be lost if the run died in doing so.
        """

        def run(iteration, *rest, **named):
            if iteration == self.args.iteration and same_folder(self.args):
                return None
            folder = self.args.save
            start = time.perf_counter()
            try:
                with self.clock.pause():
                    result = save_checkpoint(iteration, *rest, **named)
            except (Exception, CheckpointException) as error:
                if process := failed_saves.ended():
                    left = [*self.saving, iteration]
                    raise failed_saves.without_helper(self.args, process, left) from error
                raise failed_saves.not_saved(folder, iteration, error) from error
            if self.args.async_save:
                self.saving.append(iteration)
                if self.is_past_loop:
                    # No step is left to overlap with, but sets to score, which may take minutes.
                    training.maybe_finalize_async_save(blocking=True)
            if self.args.keep_last and self.args.rank == 0:
                prune(folder, self.args.keep_last)
            if self.speaks:
                verb = "saving" if self.saving else "saved"
                seconds = time.perf_counter() - start
                say(f"{verb} step {iteration:,} to {folder} ({seconds:.1f} s)")
            return result

        return run


def stop_if_asked() -> None:
    """Stop before the first step if a signal asked any rank to stop.

    All ranks call this together.

    Raises:
        Stopped: on every rank, with exit code 0.
    """
    if stopping.any_rank_asked():
        raise Stopped(f"stopped before the first step{stopping.by()}; nothing new to save", 0)


def stop_after(initialize: Callable) -> Callable:
    """Wrap Megatron's `initialize_megatron`: heed an earlier stop signal right after the call,
    before the model is built and loaded."""

    def initialize_or_stop(*args, **named):
        result = initialize(*args, **named)
        stop_if_asked()
        return result

    return initialize_or_stop


def recomputed(args: Namespace) -> str | None:
    """The part that the backward pass recomputes, by its name in `cost.flops.RECOMPUTES`."""
    if args.recompute_granularity == "full":
        return "full"
    if args.recompute_granularity != "selective":
        return None
    modules = args.recompute_modules or ["core_attn"]
    if "core_attn" in modules:
        return "core"
    return "up_proj" if "mla_up_proj" in modules and args.attention == "mlra" else None


def _mean(losses: list) -> float:
    return sum(map(_value, losses)) / len(losses)


def _value(loss) -> float:
    """A logged loss as a number, from a scalar tensor or a (sum, count) pair."""
    loss = torch.as_tensor(loss).float().flatten()
    return (loss[0] / loss[1]).item() if loss.numel() == 2 else loss.item()
