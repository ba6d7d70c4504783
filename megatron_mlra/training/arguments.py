"""Command line: Megatron's flags, this project's, and YAML presets that set defaults for both."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint

from megatron_mlra.command_line.parser import flags_given
from megatron_mlra.command_line.suggest import refusal
from megatron_mlra.description.layer_pattern import layer_pattern
from megatron_mlra.description.presets import preset_name
from megatron_mlra.fault_tolerance import integrity
from megatron_mlra.launch.ports import reserve_port
from megatron_mlra.layers.baselines.config import BaselineConfig
from megatron_mlra.layers.config import MLRAConfig
from megatron_mlra.training import data_defaults, logits
from megatron_mlra.training.all_flags import PATTERNS, member, no_yaml_cfg
from megatron_mlra.training.argument_checks import check_arguments, check_multi_token
from megatron_mlra.training.cpu_backend import CPU_DEFAULTS
from megatron_mlra.training.flags import add_mlra_arguments, preset_of, repair_help
from megatron_mlra.training.presets import add_opposites, load_preset
from megatron_mlra.training.rope import YarnConfig
from megatron_mlra.training.upstream_fixes import accumulate_weight_gradients_in_products
from megatron_mlra.training.value_checks import check_lengths, check_values

DEFAULTS = {
    "add_bias_linear": False,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "position_embedding_type": "rope",
    "swiglu": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "exit_signal_handler": True,
    "create_attention_mask_in_dataloader": False,
    "apply_rope_fusion": False,
    "num_workers": 1,
    "log_interval": 10,
    "log_throughput": True,
    "tokenizer_type": "NullTokenizer",
    "eval_interval": 1000,
    "eval_iters": 10,
    "save_interval": 1000,
    "async_strategy": "mcore",
    # Megatron ignores --async-save without the persistent worker.
    "use_persistent_ckpt_worker": True,
    "rerun_mode": "disabled",
    # Megatron's default, 1, does not tell whether it was asked for.
    "num_query_groups": None,
    # Megatron's default, delayed, takes scaling factors from the step before.
    "fp8_recipe": "tensorwise",
    # Megatron's default, blockwise, makes Muon's update depend on the tensor-parallel size.
    "muon_tp_mode": "duplicated",
    # A checkpoint can be loaded at any layout. The price is that a save gathers the optimizer's
    # state on one data-parallel rank. `dist_ckpt_optim_fully_reshardable: false` in a preset saves
    # in parallel.
    "dist_ckpt_optim_fully_reshardable": True,
    # Checksums of a checkpoint's files (fault_tolerance/checksums.py). Only a preset can turn them
    # off.
    "verify_integrity": True,
}
"""Defaults that differ from Megatron's. Presets and the command line override them."""


OWN_TYPES = {
    "tuple_type": "two numbers, as 128,0",
    "_parse_cuda_graph_modules_arg": "names of modules, as attn or mlp",
}
"""Megatron's function that converts a flag's value -> what the flag takes."""


def accelerated_defaults() -> dict[str, Any]:
    """Defaults that choose accelerated parts: on a GPU, each part that is installed is used.

    `auto` of --core-backend and --latent-kernels is resolved later, in layers/config.py.
    """
    if not torch.cuda.is_available():
        return dict(CPU_DEFAULTS)
    return {
        "transformer_impl": "transformer_engine" if HAVE_TE else "local",
        "gradient_accumulation_fusion": accumulate_weight_gradients_in_products(),
        "no_persist_layer_norm": not HAVE_TE,
    }


def parse(argv: list[str] | None = None) -> Namespace:
    """Parse and check the command line. Without a GPU, Megatron's CPU settings are the defaults.

    Args:
        argv: the words behind the program's name; None for those of `sys.argv`.

    Returns:
        the arguments, not yet validated by Megatron (`validate`).

    Raises:
        ValueError: one line that names the flag or key and the fix.
    """
    argv = sys.argv[1:] if argv is None else argv

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_mlra_arguments(parser)
        repair_help(parser)
        parser.error = partial(_refuse, parser)
        for action in parser._actions:
            if action.dest == "yaml_cfg":
                action.type = no_yaml_cfg
            if getattr(action.type, "__name__", "") == "enum_type_handler":
                action.type = member(action.type, [each.name for each in action.choices])
            elif getattr(action.type, "__name__", "") in PATTERNS:
                action.type = layer_pattern
            elif fix := OWN_TYPES.get(getattr(action.type, "__name__", "")):
                action.type = _explained(action.type, fix)
        parser.set_defaults(**DEFAULTS | accelerated_defaults())
        preset = preset_of(argv, partial(_refuse, parser))
        if preset is not None:
            parser.set_defaults(**load_preset(preset, parser))
        add_opposites(parser)
        return parser

    saved, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        args = parse_args(provider)
    finally:
        sys.argv = saved
    if args.dry_run is not None:
        if args.dry_run < 1:
            raise ValueError(f"--dry-run {args.dry_run} is no number of GPUs; use at least 1")
        args.rank, args.local_rank, args.world_size = 0, 0, args.dry_run
    data_defaults.complete(args, argv)
    check_arguments(args)
    if args.attention == "mlra":
        args.kv_channels = args.v_head_dim
    if args.reset_attention_mask:
        args.create_attention_mask_in_dataloader = True
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    if args.tensorboard_dir is None:
        args.tensorboard_dir = str(run_folder(args) / "tensorboard")
    if args.wandb_project and not (args.save or args.wandb_save_dir):
        args.wandb_save_dir = str(run_folder(args) / "wandb")
    return args


def validate(args: Namespace) -> MLRAConfig | BaselineConfig:
    """Run Megatron's own validation, then that of the model's configuration.

    Megatron's validation also fills in `args` values that were not given.

    Returns:
        the transformer config. No weight is allocated.

    Raises:
        ValueError: for an argument, or a combination, that Megatron or the model refuses.
    """
    with _refusals_as_value_errors():
        if args.use_checkpoint_args:
            asked = args.rotary_base if "--rotary-base" in flags_given(sys.argv[1:]) else None
            _load_checkpoint_args(args)
            args.rotary_base = asked or args.rotary_base
            check_multi_token(args)
        check_lengths(args)
        with logits.without_transformer_engine(args):
            validate_args(args, {})
        return transformer_config(args)


def _load_checkpoint_args(args: Namespace) -> None:
    """Take arguments from the checkpoint that the run will load, after a check that it is whole.

    Of a folder that cannot be read, Megatron would show a page of tracebacks. Of arguments that are
    refused on a command line too, `spec` names a module, which Megatron would import.

    Raises:
        ValueError: `--load` holds no checkpoint, or none that can be read, or its arguments are
            refused.
    """
    folder, asked = integrity.folder_to_load(args), args.ckpt_step
    if folder is not None and folder.name != "release":
        args.ckpt_step = int(folder.name.removeprefix("iter_"))
    try:
        load_args_from_checkpoint(args)
    finally:
        args.ckpt_step = asked
    try:
        check_values(args)
    except ValueError as error:
        raise ValueError(f"--use-checkpoint-args takes from {folder}: {error}") from None


@contextlib.contextmanager
def _refusals_as_value_errors() -> Iterator[None]:
    """Turn Megatron's refusals into ValueErrors with a message.

    Megatron refuses arguments by assertions (some without a message), by other errors and by exit.
    """
    try:
        yield
    except ValueError:
        raise
    except SystemExit:
        raise ValueError("Megatron refuses these arguments; --verbose-megatron shows why") from None
    except Exception as error:
        failed = traceback.extract_tb(error.__traceback__)[-1].line
        said = str(error) if isinstance(error, AssertionError) else ""
        said = said or f"Megatron refuses these arguments: `{failed}`"
        if not isinstance(error, AssertionError):
            said += f" ({type(error).__name__}: {error})"
        raise ValueError(said) from error


_kept: list[socket.socket] = []
"""The port of a world of one, kept for the store that opens it."""


def join_world() -> None:
    """Without a launcher, set the environment of a world of one process."""
    if "WORLD_SIZE" in os.environ:
        return
    _kept.append(reserve_port())
    alone = {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _kept[-1].getsockname()[1],
    }
    os.environ.update({name: str(value) for name, value in alone.items()})


def run_folder(args: Namespace) -> Path:
    """The folder of the run's logs: `--save`, else runs/NAME with the preset's name."""
    return Path(args.save) if args.save else Path("runs") / preset_name(args.config or "run")


def transformer_config(args: Namespace) -> MLRAConfig | BaselineConfig:
    """The transformer config of the chosen attention kind."""
    if args.attention != "mlra":
        return core_transformer_config_from_args(args, BaselineConfig)
    if args.rope_type != "yarn":
        return core_transformer_config_from_args(args, MLRAConfig)
    return core_transformer_config_from_args(
        Namespace(**vars(args) | {"rope_type": None}), YarnConfig
    )


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Raise argparse's error as one line, without the usage text of a thousand flags."""
    raise ValueError(refusal(message, parser._option_string_actions))


def _explained(convert: Callable[[str], Any], fix: str) -> Callable[[str], Any]:
    """Megatron's conversion of a value, with the fix in its error in place of the function's name.
    A conversion may end in any error."""

    def explained(value: str) -> Any:
        try:
            return convert(value)
        except Exception:
            raise argparse.ArgumentTypeError(f"{value!r:.60} is not valid; use {fix}") from None

    return explained
