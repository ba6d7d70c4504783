"""Command line: Megatron's flags, this project's, and YAML presets that set defaults for both."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
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

from megatron_mlra.command_line.parser import did_you_mean, flags_given
from megatron_mlra.description.backends import current_name
from megatron_mlra.layers.baselines.config import BaselineConfig
from megatron_mlra.layers.config import (
    CORE_BACKENDS,
    CORE_FORMS,
    LATENT_KERNELS,
    TP_LAYOUTS,
    MLRAConfig,
)
from megatron_mlra.layers.fp8 import FP8_LINEARS
from megatron_mlra.planner.gpus import GPUS
from megatron_mlra.training import data_defaults
from megatron_mlra.training.argument_checks import check_arguments
from megatron_mlra.training.cpu_backend import CPU_DEFAULTS
from megatron_mlra.training.presets import add_opposites, load_preset
from megatron_mlra.training.rope import YarnConfig
from megatron_mlra.training.upstream_fixes import accumulate_weight_gradients_in_products

ATTENTION_KINDS = ("mlra", "gqa", "gta", "mfa", "tpa")

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
    # Megatron ignores --async-save without it.
    "use_persistent_ckpt_worker": True,
    "rerun_mode": "disabled",
    # Megatron's, delayed, takes its scaling factors from the step before.
    "fp8_recipe": "tensorwise",
    # A checkpoint loads at any layout, for which saving gathers the optimizer's state on one
    # data-parallel rank; `dist_ckpt_optim_fully_reshardable: false` in a preset saves in parallel.
    "dist_ckpt_optim_fully_reshardable": True,
    # Checksums of a checkpoint's files, by fault_tolerance/checksums.py; off only by a preset.
    "verify_integrity": True,
}
"""Defaults that differ from Megatron's, below presets and the command line."""


def add_mlra_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this project's flags to Megatron's parser."""
    group = parser.add_argument_group(title="MLRA attention")
    group.add_argument(
        "--config", metavar="FILE.yaml", help="preset whose values become defaults of all flags"
    )
    group.add_argument(
        "--attention",
        choices=ATTENTION_KINDS,
        default="mlra",
        help="mlra: MLA, GLA-n, MLRA-n by --num-latent-heads and --num-branches; gqa: Megatron's"
        " own (MHA, GQA, MQA); gta, mfa, tpa: the paper's other baselines",
    )
    group.add_argument("--num-latent-heads", type=int, default=4, help="latent heads L")
    group.add_argument("--num-branches", type=int, default=4, help="branches N a head sums over")
    group.add_argument(
        "--qk-nope-head-dim", type=int, dest="qk_head_dim", help="Megatron's --qk-head-dim"
    )
    group.add_argument(
        "--qk-rope-head-dim", type=int, dest="qk_pos_emb_head_dim", help="--qk-pos-emb-head-dim"
    )
    group.add_argument("--tpa-q-rank", type=int, default=6, help="rank of TPA's queries")
    group.add_argument("--tpa-kv-rank", type=int, default=2, help="rank of TPA's keys and values")
    group.add_argument("--output-gate", action="store_true", help="gate the attention output")
    group.add_argument(
        "--no-variance-scaling", action="store_false", dest="variance_scaling", default=True
    )
    group.add_argument(
        "--no-zero-init-output",
        action="store_false",
        dest="zero_init_output",
        default=True,
        help="start the output projections at random, not at zero",
    )
    group.add_argument("--latent-tp-layout", choices=TP_LAYOUTS, default="head")
    group.add_argument("--core-form", choices=CORE_FORMS, default="auto")
    group.add_argument(
        "--core-backend",
        type=partial(current_name, "core_backend"),
        choices=CORE_BACKENDS,
        default="auto",
        help="the core by torch, Transformer Engine or this project's kernels of the absorbed form"
        " (auto: the last on Hopper GPUs with TE layers)",
    )
    group.add_argument(
        "--fp8-linears",
        choices=FP8_LINEARS,
        default="wide",
        help="which linears --fp8-format applies to: all, or those that gain (wide: MLP, output and"
        " gate projections)",
    )
    group.add_argument(
        "--latent-kernels",
        type=partial(current_name, "latent_kernels"),
        choices=LATENT_KERNELS,
        default="auto",
        help="the passes around the core by torch or by this project's kernels (auto: with TE"
        " layers)",
    )
    group.add_argument(
        "--no-recompute-absorbed-query",
        action="store_false",
        dest="recompute_absorbed_query",
        default=True,
        help="keep the absorbed core's queries for backward: more memory, no rebuilding",
    )
    group.add_argument(
        "--packed-sequences",
        action="store_true",
        dest="dataloader_inter_document_masking",
        help="documents of a sequence attend to themselves alone, their positions start anew;"
        " Megatron's --dataloader-inter-document-masking",
    )
    group.add_argument(
        "--keep-last",
        type=int,
        metavar="K",
        help="keep the newest K checkpoints of --save and delete older ones (default: keep all)",
    )
    group.add_argument(
        "--hang-timeout-seconds",
        type=float,
        metavar="SECONDS",
        help="end the job, naming the rank, when one has not answered or has kept the others"
        " waiting for this long (0: never; default: 0.8 of --distributed-timeout-minutes)",
    )
    group.add_argument(
        "--dry-run",
        type=int,
        metavar="GPUS",
        help="check the arguments for a launch on this many GPUs, print the plan, who owns what and"
        " the command, and exit; needs no GPU",
    )
    group.add_argument(
        "--dry-run-gpu", choices=GPUS, default="h100", help="the GPU that --dry-run plans with"
    )
    group.add_argument(
        "--held-out",
        nargs="+",
        metavar="NAME=PREFIX",
        help="datasets to score whole and in order behind the last step (held_out.json in --save)",
    )
    group.add_argument(
        "--data-seed",
        type=int,
        metavar="SEED",
        help="of the order of the data; default: --seed, which also draws the initial weights",
    )
    group.add_argument(
        "--eval-at-start",
        action="store_true",
        help="print the validation loss before the first step too",
    )
    group.add_argument(
        "--verbose-megatron",
        action="store_true",
        help="print everything Megatron prints, not only this project's summary and progress",
    )
    return parser


def accelerated_defaults() -> dict[str, Any]:
    """The only automatic choice of accelerated parts: each is used on a GPU, if installed."""
    if not torch.cuda.is_available():
        return dict(CPU_DEFAULTS)
    return {
        "transformer_impl": "transformer_engine" if HAVE_TE else "local",
        "gradient_accumulation_fusion": accumulate_weight_gradients_in_products(),
        "no_persist_layer_norm": not HAVE_TE,
    }


def parse(argv: list[str] | None = None) -> Namespace:
    """Parse the command line; without a GPU, Megatron's CPU settings are the defaults.

    Raises:
        ValueError: one line that names the flag or key and the fix.
    """
    argv = sys.argv[1:] if argv is None else argv

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_mlra_arguments(parser)
        parser.error = partial(_refuse, parser)
        for action in parser._actions:
            if action.dest == "yaml_cfg":
                # Megatron reads the file while parsing, and drops every other flag.
                action.type = _no_yaml_cfg
            if getattr(action.type, "__name__", "") == "enum_type_handler":
                action.type = _enum_type(action.type, [member.name for member in action.choices])
        parser.set_defaults(**DEFAULTS | accelerated_defaults())
        preset = _config_path(argv)
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
    """Megatron's own validation, which also derives values that were not given; then the model's.

    Returns:
        the transformer config; nothing is allocated for it.

    Raises:
        ValueError: for an argument or a combination Megatron or the model refuses.
    """
    with _refusals_as_value_errors():
        if args.use_checkpoint_args:
            asked = args.rotary_base if "--rotary-base" in flags_given(sys.argv[1:]) else None
            load_args_from_checkpoint(args)
            args.rotary_base = asked or args.rotary_base
        validate_args(args, {})
        return transformer_config(args)


@contextlib.contextmanager
def _refusals_as_value_errors() -> Iterator[None]:
    """Megatron refuses arguments by assertions, some without a message, other errors and exit."""
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


def join_world() -> None:
    """Without a launcher, be a world of one process."""
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in alone.items()})


def run_folder(args: Namespace) -> Path:
    """Where logs go: `--save`, else runs/ and the preset's name."""
    return Path(args.save) if args.save else Path("runs") / Path(args.config or "run").stem


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
    """argparse's error in one line, without its usage of a thousand flags."""
    unknown = re.match(r"unrecognized arguments: ([^\s=]+)", message)
    if unknown:
        options = [o for a in parser._actions for o in a.option_strings]
        what = "flag" if unknown[1].startswith("-") else "argument"
        message = f"unknown {what} {unknown[1]}{did_you_mean(unknown[1], options)}"
    raise ValueError(message)


def _no_yaml_cfg(value: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"{value} would replace all flags; use --config FILE.yaml")


def _enum_type(convert: Callable[[str], Any], names: list[str]) -> Callable[[str], Any]:
    """Megatron's conversion to an enum member, refusing unknown names as argparse expects."""

    def enum_member(name: str) -> Any:
        if name not in names:
            choices = ", ".join(names)
            raise argparse.ArgumentTypeError(f"invalid choice {name!r}; use one of {choices}")
        return convert(name)

    return enum_member


def _config_path(argv: list[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.error = partial(_refuse, finder)
    finder.add_argument("--config")
    return finder.parse_known_args(argv)[0].config
