"""The training entry, a run from its first line to its last: wiring only.

    mlra pretrain --config debug --data-path data/corpus
    torchrun --nproc-per-node 8 --no-python mlra pretrain --config mlra4_2.9b ...

Megatron's flags work, or are refused in one line. `--config` sets defaults, and the command line
overrides them. Every switch has an opposite (`--no-bf16`). `pretrain_mlra.py` and `python -m
megatron_mlra.training` start the same program.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import NoReturn

from megatron_mlra.command_line.loading import announce_loading
from megatron_mlra.command_line.output import guard
from megatron_mlra.command_line.parser import one_line
from megatron_mlra.command_line.ranks import first_of_host
from megatron_mlra.command_line.threads import wait_passively
from megatron_mlra.fault_tolerance import helper_processes, stopping
from megatron_mlra.launch.control import INTERRUPTED
from megatron_mlra.training import early_checks, flags
from megatron_mlra.training.ending import (
    EndByInterrupt,
    end_at_once,
    hush_threads,
    leave,
    refuse,
    refuse_python,
)
from megatron_mlra.training.left import what_is_left

# Megatron warns about every optional package at import. The summary names those that matter.
warnings.filterwarnings("ignore")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
wait_passively()


def main() -> int:
    """Run the training job that `sys.argv` describes; returns the exit code."""
    try:
        return _run()
    except KeyboardInterrupt as stop:
        if first_of_host():
            print(f"error: interrupted{stop}", file=sys.stderr)
        return INTERRUPTED


def _run() -> int:
    if flags.answer(sys.argv[1:]):
        return 0
    try:
        folders = early_checks.check(sys.argv[1:])
    except (ValueError, OSError) as error:
        return refuse(one_line(error))
    end_by_interrupt = EndByInterrupt()
    end_by_interrupt.what_is_left = partial(what_is_left, folders)
    stopping.listen(signal.SIGTERM, signal.SIGHUP)
    stopping.listen_to_interrupts(end_by_interrupt)
    stopping.listen_to_launcher()
    os.register_at_fork(after_in_child=hush_threads)
    try:
        return train(end_by_interrupt)
    except ImportError as error:
        return refuse_python(error)
    finally:
        stopping.close()


def has_gpu() -> bool:
    """Whether there is a GPU. Without one, sets the environment that Megatron reads at import."""
    import torch

    if torch.cuda.is_available():
        return True
    # torch.compile, behind Megatron's fused functions, would build C++ for a minute on a CPU.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    return False


def train(end_by_interrupt: EndByInterrupt | None = None) -> int:
    """Check all that can be checked, then hand over to Megatron; returns the exit code.

    Args:
        end_by_interrupt: the callable of a second Ctrl-C; its attributes are set as the run begins.
    """
    end_by_interrupt = end_by_interrupt or EndByInterrupt()
    on_cpu = not has_gpu()
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import global_vars, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_mlra.command_line.parser import check_writable, say
    from megatron_mlra.cost.parameters import parameters
    from megatron_mlra.description.megatron_args import from_megatron_args
    from megatron_mlra.fault_tolerance import fingerprint, integrity
    from megatron_mlra.fault_tolerance.run_lock import RunLock
    from megatron_mlra.training import (
        arguments,
        batches,
        console,
        dry_run,
        hooks,
        memory_check,
        progress,
        steps,
    )
    from megatron_mlra.training.cpu_backend import enable_cpu_backend
    from megatron_mlra.training.meeting import meet_all

    args, output, started, lock = None, None, False, None
    try:
        args = arguments.parse()
        given = fingerprint.of_arguments(args)
        if args.exit_signal_handler:
            stopping.listen(args.exit_signal)
        else:
            stopping.ignore_no_more()
        if not args.verbose_megatron:
            output = console.MegatronOutput(args.rank, args.world_size)
        if on_cpu:
            enable_cpu_backend()
        if args.save is not None:
            lock = RunLock(args.save, say=say, lost=end_at_once)
            end_by_interrupt.before = partial(lock.release_within, 5)
        run = hooks.Run(args, on_cpu, lock)
        hooks.apply(hooks.BEFORE_CHECKS, run)
        config = steps.model_config(args, arguments.validate(args))
        global_vars.rebuild_tokenizer(args)
        run.shape = shape = from_megatron_args(args)
        if args.dry_run:
            described = dry_run.describe(args, config.transformer, shape, sys.argv[1:])
            # One print, so that a reader such as `head` may close the pipe early.
            say("\n".join([console.summary(args, shape), *described]))
            return 0
        memory_check.check(args, shape, dry_run.layout_of(args), on_cpu)
        integrity.check_save(args, parameters(shape).total)
        if args.tensorboard_dir is not None:
            folder = Path(args.tensorboard_dir)
            check_writable(folder, f"--tensorboard-dir {folder}")
        run.new_multi_token = integrity.check_load(args)
        batches.check_data(args)

        world = meet_all(args, given, lock)
        if output is not None:
            output.open(arguments.run_folder(args))
        started, run.hosts = True, world.hosts
        end_by_interrupt.what_is_left = partial(what_is_left, args)
        hooks.apply(hooks.BEFORE_TRAINING, run)
        global_vars.set_global_variables(args, build_tokenizer=False)
        if args.exit_signal_handler:
            stopping.hand_over(global_vars.get_signal_handler())
        if args.rank == 0:
            say(console.summary(args, shape))
            say(console.on_cpu(args) if on_cpu else console.accelerated_parts(args))
        container = pretrain_cfg_container_from_args(args, config)
        try:
            training.pretrain(
                container,
                batches.build_datasets,
                ModelType.encoder_or_decoder,
                steps.forward_step,
                store=world.store,
            )
        except progress.Stopped as stop:
            if args.rank == 0:
                say(str(stop))
            if stop.code:
                return stop.code
        torch.distributed.barrier()
        if run.watch:
            run.watch.stop()
        torch.distributed.barrier()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(end_by_interrupt.what_is_left()) from None
    except (SystemExit, Exception, CheckpointException) as error:
        if args is None and isinstance(error, SystemExit):  # --help-megatron
            raise
        return console.fail_run(error, args, output, started)
    finally:
        helper_processes.end_writer()
        if lock is not None:
            lock.release()
    if args.cuda_graph_impl != "none":
        from megatron_mlra.training import cuda_graphs

        cuda_graphs.free()
    torch.distributed.destroy_process_group()
    return 0


def start() -> NoReturn:
    """Run the job and end the process with the job's exit code."""
    guard(ending=False)
    announce_loading("PyTorch and Megatron-core", "some 10 seconds")
    leave(main())
    sys.exit(0)
