"""Pretrain MLA, GLA, MLRA and their baselines on Megatron-core.

    python pretrain_mlra.py --config examples/configs/debug.yaml --data-path data/corpus
    torchrun --nproc-per-node 8 pretrain_mlra.py --config examples/configs/mlra4_2.9b.yaml ...

All Megatron flags work; `--config` sets defaults, the command line wins.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

# Megatron warns about every optional package at import; the summary names what matters.
warnings.filterwarnings("ignore")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def main() -> int:
    """Run one training job; returns the exit code."""
    import torch

    from megatron_mlra import console

    log: Path | None = None
    try:
        from megatron.core.enums import ModelType
        from megatron.training import global_vars, training
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        from megatron_mlra import arguments, data, model, upstream_fixes
        from megatron_mlra.accounting import ModelShape, parameters
        from megatron_mlra.checkpoint import integrity
        from megatron_mlra.cpu_backend import enable_cpu_backend

        on_cpu = not torch.cuda.is_available()
        args = arguments.parse()
        log = console.redirect_megatron(args, arguments.run_folder(args))
        arguments.validate(args)
        arguments.join_world()
        if on_cpu:
            enable_cpu_backend()
        upstream_fixes.use_prebuilt_dataset_helpers()
        upstream_fixes.repair_torch_adamw_resume()
        global_vars.set_global_variables(args)

        shape = ModelShape.from_args(args)
        integrity.check_save(args, parameters(shape).total)
        integrity.check_load(args)
        data.check_data(args)
        config = model.model_config(args)
        if args.rank == 0:
            console.say(console.summary(args, shape))
            if on_cpu:
                console.say("no GPU found: running on the CPU (gloo, torch attention)")
            console.say(console.accelerated_parts(args))
        console.Progress(args, shape).install()

        container = pretrain_cfg_container_from_args(args, config)
        training.pretrain(
            container, data.build_datasets, ModelType.encoder_or_decoder, model.forward_step
        )
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except Exception as error:
        return console.fail(error, log)
    return 0


if __name__ == "__main__":
    code = main()
    if code:
        # Other ranks may wait in a collective: do not wait for them at interpreter exit.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
