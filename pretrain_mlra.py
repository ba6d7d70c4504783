"""Pretrain MLA, GLA, MLRA and their baselines on Megatron-core.

    python pretrain_mlra.py --config examples/configs/debug.yaml --data-path data/corpus
    torchrun --nproc-per-node 8 pretrain_mlra.py --config examples/configs/mlra4_2.9b.yaml ...

All Megatron flags work; `--config` sets defaults, the command line wins, and every switch has an
opposite (`--no-bf16`).
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_mlra.fault_tolerance.run_lock import RunLock

from megatron_mlra.fault_tolerance import stopping

# Megatron warns about every optional package at import; the summary names what matters.
warnings.filterwarnings("ignore")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def main() -> int:
    """Run one training job; returns the exit code."""
    stopping.listen(signal.SIGTERM)
    os.register_at_fork(after_in_child=hush_threads)
    try:
        return train()
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("error: interrupted", file=sys.stderr)
        return 130
    finally:
        stopping.close()


def has_gpu() -> bool:
    """Whether there is a GPU; without one, sets what Megatron needs set when it is imported."""
    import torch

    if torch.cuda.is_available():
        return True
    # torch.compile, behind Megatron's fused functions, would build C++ for a minute on a CPU.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    return False


def train() -> int:
    """Check all that can be checked, then hand over to Megatron; returns the exit code."""
    on_cpu = not has_gpu()
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import global_vars, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_mlra.checkpoint.files import guarded_loads
    from megatron_mlra.command_line.parser import say
    from megatron_mlra.cost.parameters import parameters
    from megatron_mlra.description.megatron_args import from_megatron_args
    from megatron_mlra.fault_tolerance import (
        checksums,
        fingerprint,
        heartbeat,
        helper_processes,
        integrity,
        resume,
        samples,
        saved_files,
    )
    from megatron_mlra.fault_tolerance.handshake import meet
    from megatron_mlra.fault_tolerance.run_lock import RunLock
    from megatron_mlra.training import (
        arguments,
        console,
        dry_run,
        progress,
        steps,
        upstream_fixes,
        validation,
    )
    from megatron_mlra.training import batches as data
    from megatron_mlra.training.cpu_backend import enable_cpu_backend

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
        upstream_fixes.use_prebuilt_dataset_helpers()
        upstream_fixes.repair_torch_adamw_resume()
        upstream_fixes.take_up_moments_at_another_rate()
        upstream_fixes.name_failed_checkpoint_writes()
        guarded_loads.install()
        checksums.install()
        if args.save is not None:
            lock = RunLock(args.save, say=say, lost=end_at_once)
        helper_processes.install(args.exit_signal, lock.path if lock else None)
        config = steps.model_config(args, arguments.validate(args))
        global_vars.rebuild_tokenizer(args)
        shape = from_megatron_args(args)
        if args.dry_run:
            described = dry_run.describe(args, config.transformer, shape, sys.argv[1:])
            # At once, so that a reader may leave early.
            say("\n".join([console.summary(args, shape), *described]))
            return 0
        integrity.check_save(args, parameters(shape).total)
        if args.tensorboard_dir is not None:
            integrity.check_writable("--tensorboard-dir", args.tensorboard_dir)
        integrity.check_load(args)
        data.check_data(args)

        arguments.join_world()
        same = {"code": fingerprint.of_code(), "arguments": given}
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the ranks of a host see the same files
            same["data"] = fingerprint.of_data(args)
        same["derived arguments"] = fingerprint.of_arguments(args)
        world = meet(
            args.rank,
            args.world_size,
            same,
            seconds=60 * args.distributed_timeout_minutes,
            save=args.save,
            enter=lambda: enter(args, lock),
        )
        if output is not None:
            output.open(arguments.run_folder(args))

        started = True
        saved_files.install(world.hosts, lock.successor if lock else lambda: None)
        helper_processes.start_results_queue(args.exit_signal)
        global_vars.set_global_variables(args, build_tokenizer=False)
        if args.exit_signal_handler:
            stopping.hand_over(global_vars.get_signal_handler())
        if args.rank == 0:
            say(console.summary(args, shape))
            if on_cpu:
                say(console.on_cpu(args))
            say(console.accelerated_parts(args))
        progress.Progress(args, shape).install()
        validation.install(args)
        resume.install(args)
        samples.install()
        stop_watch = heartbeat.install(
            args, arguments.run_folder(args), lambda: lock and lock.release_within(5)
        )
        progress.stop_once_met()
        container = pretrain_cfg_container_from_args(args, config)
        try:
            training.pretrain(
                container,
                data.build_datasets,
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
        stop_watch()
        torch.distributed.barrier()
    except SystemExit as end:
        if args is None:  # --help
            raise
        code = console.fail(end, output, started)
        kill_children()
        return code
    except (Exception, CheckpointException) as error:
        if started and args.save and not os.path.isdir(args.save):
            error = save_is_gone(args, error)
        code = console.fail(error, output, started)
        # Behind the error's line: the log's folder may be what is broken.
        with contextlib.suppress(Exception):
            if writer := global_vars.get_tensorboard_writer():
                writer.flush()
        kill_children()
        return code
    finally:
        if lock is not None:
            lock.release()
    torch.distributed.destroy_process_group()
    return 0


def hush_threads() -> None:
    """Threads hand tensors to other processes, which may be gone on the way out: no tracebacks of
    theirs."""
    sys.excepthook = lambda *_: None


def enter(args: Namespace, lock: RunLock | None) -> None:
    """What rank 0 does for all: compare the data with their checksums, and make `--save` this run's
    own; what it holds was looked at before."""
    from megatron_mlra.command_line.parser import say
    from megatron_mlra.fault_tolerance import integrity
    from megatron_mlra.training import batches

    batches.check_data_contents(args, say)
    if lock is not None:
        lock.acquire()
        integrity.check_unused(args)


def save_is_gone(args: Namespace, error: BaseException) -> RuntimeError:
    """What to say of an error in a run whose folder was deleted, or unmounted, under it."""
    step = getattr(args, "curr_iteration", 0) + 1
    gone = RuntimeError(
        f"--save {args.save} is gone (deleted, or unmounted) at step {step:,}: its checkpoints are"
        f" lost with it ({' '.join(str(error).split())})"
    )
    gone.__cause__ = error
    return gone


def end_at_once(line: str) -> None:
    """End this process from any thread, whatever the main thread waits for."""
    os.write(2, f"error: {line}\n".encode())
    os._exit(1)


def kill_children() -> None:
    """End the writers of checkpoints and the data loaders of a run that failed."""
    hush_threads()
    # torch's handler raises an error for a data loader that is killed.
    with contextlib.suppress(ValueError):  # outside the main thread, there is none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    for child in children:
        child.join(5)


def leave(code: int) -> None:
    """End the process. After a failure other ranks may wait in a collective, and data loaders for
    work: wait for neither."""
    sys.stderr.flush()
    if not code:
        return
    kill_children()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
