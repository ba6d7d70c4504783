"""Command line: Megatron's flags, this project's, and YAML presets that set defaults for both."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import socket
import sys
import traceback
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel.layers import (
    _grad_accum_fusion_available as HAVE_FUSED_WEIGHT_GRADIENT,
)
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint

from megatron_mlra.baselines import BaselineConfig
from megatron_mlra.config import CORE_BACKENDS, CORE_FORMS, TP_LAYOUTS, MLRAConfig
from megatron_mlra.cpu_backend import CPU_DEFAULTS

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
    "rerun_mode": "disabled",
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
        help="mlra: MLA, GLA-n, MLRA-n by --num-latent-heads and --num-branches; gqa: Megatron's own"
        " (MHA, GQA, MQA); gta, mfa, tpa: the paper's other baselines",
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
    group.add_argument("--core-backend", choices=CORE_BACKENDS, default="auto")
    group.add_argument(
        "--verbose-megatron",
        action="store_true",
        help="print everything Megatron prints, not only this project's summary and progress",
    )
    return parser


def accelerated_defaults() -> dict[str, Any]:
    """The one automatic choice of accelerated parts: each is used where it is installed."""
    return {
        "transformer_impl": "transformer_engine" if HAVE_TE else "local",
        "gradient_accumulation_fusion": HAVE_FUSED_WEIGHT_GRADIENT,
        "no_persist_layer_norm": not HAVE_TE,
    }


def parse(argv: list[str] | None = None) -> Namespace:
    """Parse the command line; without a GPU, set what Megatron needs on a CPU.

    Raises:
        ValueError: one line that names the flag or key and the fix.
    """
    argv = sys.argv[1:] if argv is None else argv

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_mlra_arguments(parser)
        parser.error = partial(_refuse, parser)
        parser.set_defaults(**DEFAULTS, **accelerated_defaults())
        preset = _config_path(argv)
        if preset is not None:
            parser.set_defaults(**load_preset(preset, parser))
        return parser

    saved, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        args = parse_args(provider)
    finally:
        sys.argv = saved
    if not torch.cuda.is_available():
        if args.transformer_impl != "local" and "--transformer-impl" in argv:
            raise ValueError(f"--transformer-impl {args.transformer_impl} needs a GPU; use local")
        for name, value in CPU_DEFAULTS.items():
            setattr(args, name, value)
    _check(args)
    if args.tensorboard_dir is None:
        args.tensorboard_dir = str(run_folder(args) / "tensorboard")
    return args


def validate(args: Namespace) -> None:
    """Megatron's own validation, which prints, and derives what is left open.

    Raises:
        ValueError: for an argument or a combination Megatron refuses.
    """
    if args.use_checkpoint_args:
        load_args_from_checkpoint(args)
    try:
        validate_args(args, {})
    except AssertionError as error:
        failed = traceback.extract_tb(error.__traceback__)[-1].line
        raise ValueError(str(error) or f"Megatron refuses these arguments: `{failed}`") from error


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


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """argparse's error in one line, without its usage of a thousand flags."""
    unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
    if unknown:
        options = [o for a in parser._actions for o in a.option_strings]
        near = difflib.get_close_matches(unknown[1], options, 1)
        message = f"unknown flag {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "")
    raise ValueError(message)


def transformer_config(args: Namespace) -> MLRAConfig | BaselineConfig:
    """The transformer config of the chosen attention kind."""
    return core_transformer_config_from_args(
        args, MLRAConfig if args.attention == "mlra" else BaselineConfig
    )


def load_preset(path: str | Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read a YAML preset into argparse defaults.

    Keys are flags without dashes in front and with underscores, or their argparse destinations; `base`
    names another preset, relative to this one, whose values this one overrides.

    Raises:
        ValueError: for a missing file, bad YAML, an unknown key (names the nearest known one) or a value
            the flag would refuse.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ValueError(f"--config {path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected lines of `key: value`, found {values!r:.60}")
    defaults: dict[str, Any] = {}
    base = values.pop("base", None)
    if base is not None:
        defaults.update(load_preset(path.parent / base, parser))
    known = _names(parser)
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--config {path}: unknown key {key!r}{hint}")
        action, by_flag = known[key]
        defaults[action.dest] = _value(path, key, value, action, by_flag)
    return defaults


def _value(path: Path, key: str, value: Any, action: argparse.Action, by_flag: bool) -> Any:
    """`value` of a preset as the parser would have stored it."""
    if isinstance(action, argparse._StoreTrueAction | argparse._StoreFalseAction):
        if not isinstance(value, bool):
            raise ValueError(f"--config {path}: {key} is {value!r}; use true or false")
        on = isinstance(action, argparse._StoreTrueAction)
        return value == on if by_flag else value
    if value is None or isinstance(value, bool):
        return value
    try:
        if isinstance(value, list):
            return [action.type(str(v)) if action.type else v for v in value]
        converted = action.type(str(value)) if action.type else value
    except (TypeError, ValueError):
        kind = getattr(action.type, "__name__", "value")
        raise ValueError(f"--config {path}: {key} is {value!r}, not a valid {kind}") from None
    if action.choices is not None and converted not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise ValueError(f"--config {path}: {key} is {value!r}; use one of {choices}")
    return converted


def _names(parser: argparse.ArgumentParser) -> dict[str, tuple[argparse.Action, bool]]:
    """Every key a preset may use -> (action, whether the key is the flag's own name)."""
    names: dict[str, tuple[argparse.Action, bool]] = {}
    for action in parser._actions:
        names.setdefault(action.dest, (action, False))
    for action in parser._actions:
        for option in action.option_strings:
            names[option.lstrip("-").replace("-", "_")] = (action, True)
    return names


def _config_path(argv: list[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    return finder.parse_known_args(argv)[0].config


def _check(args: Namespace) -> None:
    """Refuse what Megatron would find late, or report as a bare assertion."""
    for name in (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "seq_length",
        "micro_batch_size",
    ):
        if getattr(args, name) is None:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is missing; give it, or a preset with --config")
    if args.multi_latent_attention:
        raise ValueError("--multi-latent-attention is Megatron's own MLA; use --attention mlra")
    if args.yaml_cfg is not None:
        raise ValueError("--yaml-cfg replaces all flags; use --config FILE.yaml")
    if args.spec is not None:
        raise ValueError("--spec replaces the attention; use --attention")
    if args.train_iters is None and args.train_samples is None and not args.skip_train:
        raise ValueError("--train-iters is missing; say how many steps to train")
    decay = args.lr_decay_iters or args.train_iters
    if decay and args.lr_warmup_iters >= decay:
        raise ValueError(
            f"--lr-warmup-iters {args.lr_warmup_iters} leaves nothing of the {decay} steps the rate"
            f" decays over; use at most {decay - 1}"
        )
    if args.reset_attention_mask and not args.create_attention_mask_in_dataloader:
        args.create_attention_mask_in_dataloader = True
    if args.world_size == 1 and args.tensor_model_parallel_size > 1:
        tp = args.tensor_model_parallel_size
        raise ValueError(
            f"--tensor-model-parallel-size {tp} needs {tp} processes; launch with torchrun"
            f" --nproc-per-node {tp}"
        )
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
