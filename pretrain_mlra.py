"""Pretrain MLA, GLA, MLRA and their baselines on Megatron-core.

    python pretrain_mlra.py --config examples/configs/debug.yaml --data-path data/corpus
    torchrun --nproc-per-node 8 pretrain_mlra.py --config examples/configs/mlra4_2.9b.yaml ...

All Megatron flags work; `--config` sets defaults, the command line wins, and every switch has an
opposite (`--no-bf16`).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import warnings

# Megatron warns about every optional package at import; the summary names what matters.
warnings.filterwarnings("ignore")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def main() -> int:
    """Run one training job; returns the exit code."""
    os.register_at_fork(after_in_child=hush_threads)
    try:
        return train()
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("error: interrupted", file=sys.stderr)
        return 130


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

    from megatron_mlra import arguments, console, data, dry_run, model, upstream_fixes
    from megatron_mlra.accounting import ModelShape, parameters
    from megatron_mlra.checkpoint import checksums, helper_processes, integrity
    from megatron_mlra.cpu_backend import enable_cpu_backend
    from megatron_mlra.evaluation import held_out
    from megatron_mlra.fault_tolerance import batches, heartbeat, resume
    from megatron_mlra.progress import Progress, Stopped

    args, output, started = None, None, False
    try:
        args = arguments.parse()
        if not args.verbose_megatron:
            output = console.MegatronOutput(args.rank, args.world_size)
        if on_cpu:
            enable_cpu_backend()
        upstream_fixes.use_prebuilt_dataset_helpers()
        upstream_fixes.repair_torch_adamw_resume()
        upstream_fixes.name_failed_checkpoint_writes()
        checksums.install()
        helper_processes.install(args.exit_signal)
        config = model.model_config(args, arguments.validate(args))
        global_vars.rebuild_tokenizer(args)
        shape = ModelShape.from_args(args)
        if args.dry_run:
            described = dry_run.describe(args, config.transformer, shape, sys.argv[1:])
            # At once, so that a reader may leave early.
            console.say("\n".join([console.summary(args, shape), *described]))
            return 0
        integrity.check_save(args, parameters(shape).total)
        if args.tensorboard_dir is not None:
            integrity.check_writable("--tensorboard-dir", args.tensorboard_dir)
        integrity.check_load(args)
        data.check_data(args)
        if output is not None:
            output.open(arguments.run_folder(args))

        started = True
        arguments.join_world()
        helper_processes.start_results_queue(args.exit_signal)
        global_vars.set_global_variables(args, build_tokenizer=False)
        if args.rank == 0:
            console.say(console.summary(args, shape))
            if on_cpu:
                console.say(console.on_cpu(args))
            console.say(console.accelerated_parts(args))
        held_out.install(args, arguments.run_folder(args))
        Progress(args, shape).install()
        resume.install(args)
        batches.install()
        stop_watch = heartbeat.install(args, arguments.run_folder(args))
        container = pretrain_cfg_container_from_args(args, config)
        try:
            training.pretrain(
                container, data.build_datasets, ModelType.encoder_or_decoder, model.forward_step
            )
        except Stopped as stop:
            if args.rank == 0:
                console.say(str(stop))
            if stop.code:
                return stop.code
        torch.distributed.barrier()
        stop_watch()
        torch.distributed.barrier()
    except SystemExit as end:
        if args is None:  # --help
            raise
        return console.fail(end, output, started)
    except (Exception, CheckpointException) as error:
        if writer := global_vars.get_tensorboard_writer():
            writer.flush()
        return console.fail(error, output, started)
    torch.distributed.destroy_process_group()
    return 0


def hush_threads() -> None:
    """Threads hand tensors to other processes, which may be gone on the way out: no tracebacks of
    theirs."""
    sys.excepthook = lambda *_: None


def leave(code: int) -> None:
    """End the process. After a failure other ranks may wait in a collective, and data loaders for
    work: wait for neither."""
    sys.stderr.flush()
    if not code:
        return
    hush_threads()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
