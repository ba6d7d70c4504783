"""Checks of the command line, before Megatron sees it.

The checks refuse flags that Megatron would silently ignore, would reject only minutes later, or
would reject by an assertion without a message. Each error names the flag, its value and the fix.
"""

from __future__ import annotations

import importlib.util
import math
from argparse import Namespace

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_mlra.command_line.numbers import largest_divisor
from megatron_mlra.command_line.parser import flag
from megatron_mlra.evaluation.token_stream import named_sets
from megatron_mlra.fault_tolerance.hang import collective_seconds
from megatron_mlra.layers.config import resolve_core_backend
from megatron_mlra.training import (
    batch_schedule,
    interval_checks,
    logits,
    memory_flags,
    muon,
    schedule,
)
from megatron_mlra.training.cpu_backend import CPU_DEFAULTS
from megatron_mlra.training.expert_checks import check_experts
from megatron_mlra.training.rope import check_rope
from megatron_mlra.training.value_checks import check_required, check_values


def check_arguments(args: Namespace) -> None:
    """Refuse arguments, and combinations of arguments, that cannot work.

    Raises:
        ValueError: one line that names the flag and the fix.
    """
    _check_values(args)
    _check_retention(args)
    _check_hang_timeout(args)
    _check_schedule(args)
    _check_precision(args)
    _check_parallel(args)
    _check_context_parallel(args)
    _check_packed(args)
    check_multi_token(args)
    _check_held_out(args)
    _check_batches(args)
    check_rope(args)
    _check_packages(args)
    muon.check(args)
    logits.check(args)
    memory_flags.check(args)
    check_experts(args)
    _check_graphs(args)


def _check_values(args: Namespace) -> None:
    check_required(args)
    check_values(args)
    schedule.check(args)
    interval_checks.check(args)
    if args.tokenizer_type == "NullTokenizer" and args.vocab_size is None:
        raise ValueError("--vocab-size is missing; give the size of the data's vocabulary")
    padded = args.padded_vocab_size
    if padded is not None and args.vocab_size is not None and padded < args.vocab_size:
        raise ValueError(
            f"padded_vocab_size {padded} is smaller than --vocab-size {args.vocab_size}; leave it"
            " out"
        )
    if args.query_head_norm and args.attention != "mlra":
        instead = "use --qk-layernorm" if args.attention == "gqa" else "leave it out"
        raise ValueError(
            f"--query-head-norm is of latent attention, and --attention is {args.attention};"
            f" {instead}"
        )
    _check_groups(args)
    heads = args.num_attention_heads
    if args.attention != "mlra" and args.kv_channels is None and args.hidden_size % heads:
        raise ValueError(
            f"--num-attention-heads {heads} does not divide --hidden-size {args.hidden_size}; give"
            " --kv-channels"
        )
    position = args.max_position_embeddings
    if position is not None and position < args.seq_length:
        raise ValueError(
            f"--max-position-embeddings {position} is shorter than --seq-length {args.seq_length};"
            f" use --max-position-embeddings {args.seq_length}"
        )


def _check_groups(args: Namespace) -> None:
    """Refuse a number of query groups that Megatron would ignore: every head would get keys and
    values of its own."""
    groups, args.num_query_groups = args.num_query_groups, args.num_query_groups or 1
    grouped = args.group_query_attention or args.use_checkpoint_args
    if groups is not None and not grouped and args.attention in ("gqa", "gta"):
        raise ValueError(
            f"--num-query-groups {groups} has no effect without --group-query-attention; add it"
        )


def _check_retention(args: Namespace) -> None:
    if args.keep_last is not None and args.save_retain_interval is not None:
        raise ValueError(
            f"--keep-last {args.keep_last} and --save-retain-interval {args.save_retain_interval}"
            " exclude each other; use one"
        )


def _check_hang_timeout(args: Namespace) -> None:
    seconds, collective = args.hang_timeout_seconds, collective_seconds(args)
    if not seconds:
        return
    if seconds >= collective:
        raise ValueError(
            f"--hang-timeout-seconds {seconds:g} comes after the {collective:g} seconds of a"
            " collective, which name no rank; use less, or raise --distributed-timeout-minutes"
        )


def _check_schedule(args: Namespace) -> None:
    if args.train_iters is None and args.train_samples is None and not args.skip_train:
        raise ValueError("--train-iters is missing; say how many steps to train")
    if args.min_lr is not None and args.min_lr > args.lr:
        raise ValueError(f"--min-lr {args.min_lr:g} is above --lr {args.lr:g}; use at most --lr")


def _check_precision(args: Namespace) -> None:
    if args.bf16 and args.fp16:
        raise ValueError("--bf16 and --fp16 exclude each other; use --bf16")
    if args.dry_run and not torch.cuda.is_available():
        return  # --dry-run plans for the GPUs of another machine
    for name in ("fp8", "fp4"):
        if getattr(args, name) and not (HAVE_TE and args.transformer_impl == "transformer_engine"):
            raise ValueError(
                f"--{name}-format {getattr(args, name)} needs Transformer Engine on a GPU; install"
                " the extra megatron-mlra[te] and leave --transformer-impl out, or use --bf16"
            )
    if args.fp8:
        check_fp8_tokens(args)
    if torch.cuda.is_available():
        return
    if args.latent_kernels == "mlra_kernels":
        raise ValueError("--latent-kernels mlra_kernels needs a GPU, and there is none; use torch")
    for name, value in CPU_DEFAULTS.items():
        asked = getattr(args, name)
        if asked != value:
            fix = f"use {value}" if isinstance(value, str) else "leave it out"
            shown = flag(name) + ("" if isinstance(asked, bool) else f" {asked}")
            raise ValueError(f"{shown} needs a GPU, and there is none; {fix}")


def check_fp8_tokens(args: Namespace) -> None:
    """Refuse a micro-batch whose tokens per rank are no multiple of 16.

    FP8 matrix products need dims that are multiples of 16, and tokens are a dim of the products
    that compute weight gradients.

    Raises:
        ValueError: names the micro-batch and the next sequence length that works.
    """
    ranks = args.context_parallel_size
    ranks *= args.tensor_model_parallel_size if args.sequence_parallel else 1
    for prefix in ("", "eval_"):
        micro = getattr(args, f"{prefix}micro_batch_size") or args.micro_batch_size
        if args.seq_length * micro % (16 * ranks):
            step = 16 * ranks // math.gcd(16 * ranks, micro)
            raise ValueError(
                f"--seq-length {args.seq_length} with {flag(prefix + 'micro_batch_size')} {micro}:"
                f" FP8 needs a multiple of 16 tokens per rank; use --seq-length"
                f" {-(-args.seq_length // step) * step}"
            )


def _check_parallel(args: Namespace) -> None:
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    layout = f"--tensor-model-parallel-size {tp}"
    for name in ("pipeline_model_parallel_size", "context_parallel_size"):
        if getattr(args, name) > 1:
            layout += f" x {flag(name)} {getattr(args, name)}"
    for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"):
        if pp == 1 and getattr(args, name) is not None:
            raise ValueError(
                f"{flag(name)} {getattr(args, name)} is about a pipeline's stages, and"
                " --pipeline-model-parallel-size is 1; leave it out"
            )
    ranks = tp * pp * args.context_parallel_size
    if args.world_size % ranks:
        heads = args.num_attention_heads
        if heads % tp:  # more processes would be refused too
            best = largest_divisor(heads, tp)
            raise ValueError(
                f"--tensor-model-parallel-size {tp} does not divide --num-attention-heads {heads};"
                f" use {best}"
            )
        raise ValueError(
            f"{layout} needs a multiple of {ranks} processes and there are {args.world_size};"
            f" launch with torchrun --nproc-per-node {ranks}"
        )
    # A first or last stage that is split into virtual stages also holds layers of the middle.
    if args.reset_attention_mask and (pp > 2 or (pp > 1 and _is_interleaved(args))):
        raise ValueError(
            f"--reset-attention-mask with --pipeline-model-parallel-size {pp}: stages in the middle"
            " do not see the mask; use at most 2 stages, not split into virtual ones"
        )
    core = resolve_core_backend(args.core_backend, args.transformer_impl)
    if args.reset_attention_mask and core != "torch":
        raise ValueError(
            f"--reset-attention-mask: the causal core of --core-backend {core} does not see the"
            " mask; use --core-backend torch, or --transformer-impl local"
        )


def _check_context_parallel(args: Namespace) -> None:
    cp = args.context_parallel_size
    if cp == 1:
        return
    asked = f"--context-parallel-size {cp}"
    _check_attention_of(args, asked)
    tp = args.tensor_model_parallel_size if args.sequence_parallel else 1
    step = math.lcm(2 * cp, cp * tp)
    if args.seq_length % step:
        shared = f" and {tp} sequence-parallel ranks" if tp > 1 else ""
        raise ValueError(
            f"--seq-length {args.seq_length} does not divide into the {2 * cp} chunks of {asked}"
            f"{shared}; use {-(-args.seq_length // step) * step}"
        )
    if args.attention == "mlra" and args.cp_comm_type != ["p2p"]:
        raise ValueError(
            f"--cp-comm-type {' '.join(args.cp_comm_type)} is for attentions that send keys and"
            " values; MLRA gathers latents: leave it out"
        )


def _check_packed(args: Namespace) -> None:
    if not args.dataloader_inter_document_masking:
        return
    _check_attention_of(args, "--packed-sequences")
    if args.attention != "mlra" and args.context_parallel_size > 1:
        raise ValueError(
            f"--packed-sequences with --context-parallel-size {args.context_parallel_size}:"
            f" --attention {args.attention} would need padded documents; use 1"
        )
    if args.reset_attention_mask:
        raise ValueError(
            "--packed-sequences and --reset-attention-mask both keep documents apart; leave out"
            " --reset-attention-mask, the slower one"
        )
    micro = max(args.micro_batch_size, args.eval_micro_batch_size or 1)
    if micro > 1 and args.pipeline_model_parallel_size > 1:
        raise ValueError(
            f"--packed-sequences sends one row of tokens between pipeline stages, and"
            f" --micro-batch-size is {micro}; use 1"
        )
    if args.cuda_graph_impl != "none":
        raise ValueError(
            f"--cuda-graph-impl {args.cuda_graph_impl} replays one batch's documents on all with"
            " --packed-sequences; use none"
        )


def check_multi_token(args: Namespace) -> None:
    """Refuse what multi-token prediction cannot be combined with.

    Called a second time with `--use-checkpoint-args`, once the checkpoint's arguments are taken.

    Raises:
        ValueError: one line that names the flag and the fix.
    """
    depths = args.mtp_num_layers
    if not depths:
        args.mtp_num_layers = None  # Megatron's code tests for None
        for name in ("mtp_use_repeated_layer", "mtp_detach_heads"):
            # The checkpoint's arguments may name depths.
            if getattr(args, name) and not args.use_checkpoint_args:
                raise ValueError(f"{flag(name)} has no effect without --mtp-num-layers; add it")
        return
    if depths < 0:
        raise ValueError(f"--mtp-num-layers {depths} is negative; use e.g. 1, or leave it out")
    if args.pipeline_model_parallel_layout is not None:
        raise ValueError(
            f"--mtp-num-layers {depths} stands on the last pipeline stage;"
            " --pipeline-model-parallel-layout"
            f" {args.pipeline_model_parallel_layout} may place it elsewhere: leave one out"
        )
    if args.reset_attention_mask:
        raise ValueError(
            f"--mtp-num-layers {depths} would predict across documents with"
            " --reset-attention-mask; use --packed-sequences"
        )


def _check_held_out(args: Namespace) -> None:
    if not named_sets(args.held_out):
        return
    if args.skip_train:
        said = "--held-out scores behind the last step, and --skip-train makes none"
        raise ValueError(f"{said}; score a checkpoint with mlra evaluate")
    for name in (
        "dataloader_inter_document_masking",
        "reset_attention_mask",
        "reset_position_ids",
        "create_attention_mask_in_dataloader",
    ):
        if getattr(args, name):
            shown = "packed_sequences" if name.startswith("dataloader") else name
            raise ValueError(
                f"--held-out scores documents in one stream, {flag(shown)} keeps them apart; leave"
                " one out"
            )


def _check_attention_of(args: Namespace, asked: str) -> None:
    """Refuse the flag `asked` for attention kinds that cannot serve it.

    MLRA serves the flag always, Megatron's own attention only by Transformer Engine, others never.
    """
    if args.attention == "mlra":
        return
    fix = "use --attention mlra"
    if args.attention == "gqa":
        if args.transformer_impl == "transformer_engine":
            return
        fix = "Megatron's own attention needs Transformer Engine and a GPU for it, or " + fix
    raise ValueError(f"{asked} does not work with --attention {args.attention}: {fix}")


def _is_interleaved(args: Namespace) -> bool:
    return any(
        getattr(args, name) is not None
        for name in (
            "num_layers_per_virtual_pipeline_stage",
            "num_virtual_stages_per_pipeline_rank",
            "pipeline_model_parallel_layout",
        )
    )


def _check_batches(args: Namespace) -> None:
    replicas = args.world_size // (
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )
    batch_schedule.check(args, replicas)
    parts, ranks = args.num_distributed_optimizer_instances, replicas * args.context_parallel_size
    if ranks % parts:
        raise ValueError(
            f"--num-distributed-optimizer-instances {parts} does not divide the {ranks} ranks that"
            " share an optimizer; use 1"
        )
    for prefix in ("", "eval_"):
        batch = getattr(args, f"{prefix}global_batch_size") or args.global_batch_size
        micro = getattr(args, f"{prefix}micro_batch_size") or args.micro_batch_size
        if batch is not None and batch % (micro * replicas):
            nearest = -(-batch // (micro * replicas)) * micro * replicas
            raise ValueError(
                f"{flag(prefix + 'global_batch_size')} {batch} does not divide into micro-batches"
                f" of {micro} on {replicas} data-parallel ranks; use {nearest}, or another"
                f" {flag(prefix + 'micro_batch_size')}"
            )


def _check_graphs(args: Namespace) -> None:
    if args.dry_run is not None or torch.cuda.is_available():
        return
    shown = f"--cuda-graph-impl {args.cuda_graph_impl}" if args.cuda_graph_impl != "none" else ""
    shown = shown or next((flag(name) for name in _OLD_GRAPHS if getattr(args, name)), "")
    if shown:
        raise ValueError(f"{shown} needs a GPU, and there is none; leave it out")


_OLD_GRAPHS = ("enable_cuda_graph", "external_cuda_graph")


def _check_packages(args: Namespace) -> None:
    if args.use_te_activation_func and args.transformer_impl != "transformer_engine":
        raise ValueError(
            "--use-te-activation-func needs Transformer Engine and a GPU; install the extra"
            " megatron-mlra[te], or leave it out"
        )
    if args.moe_latent_size is not None and not HAVE_TE:
        raise ValueError(
            f"--moe-latent-size {args.moe_latent_size} needs Transformer Engine and a GPU; install"
            " the extra megatron-mlra[te], or leave it out"
        )
    if args.enable_ft_package and importlib.util.find_spec("nvidia_resiliency_ext") is None:
        raise ValueError(
            "--enable-ft-package needs nvidia-resiliency-ext; pip install it, or leave it out"
        )
    if args.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"--wandb-project {args.wandb_project} needs wandb; pip install wandb")
    if args.wandb_project and not args.wandb_exp_name:
        raise ValueError(
            f"--wandb-project {args.wandb_project} needs a name for this run; use --wandb-exp-name"
        )
