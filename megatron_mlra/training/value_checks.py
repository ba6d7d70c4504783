"""Checks of values that need no other argument.

They are made before torch is imported, of what the command line and its preset give, and again when
all arguments are known. Megatron takes some bad numbers until the optimizer is built, or the first
update is not finite: the run would end as after a fault, and a launcher would start it again.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace

from megatron_mlra.command_line.numbers import MOST_PROCESSES
from megatron_mlra.command_line.parser import flag
from megatron_mlra.description.layer_pattern import FORM
from megatron_mlra.training import batch_schedule

REPLACED = {
    "multi_latent_attention": "is Megatron's own MLA; use --attention mlra",
    "spec": "replaces the attention; use --attention",
    "hybrid_layer_pattern": "builds Megatron's hybrid models; leave it out",
    "hybrid_override_pattern": "builds Megatron's hybrid models; leave it out",
    "heterogeneous_layers_config_path": "replaces the layers; leave it out",
    "heterogeneous_layers_config_encoded_json": "replaces the layers; leave it out",
    "hybrid_context_parallel": "is not supported; use --context-parallel-size alone",
    "hierarchical_context_parallel_sizes": "is not supported; use --context-parallel-size alone",
    "full_validation": "fails in Megatron 0.19.2 after the first evaluation; raise --eval-iters",
    "multiple_validation_sets": "needs --full-validation, which fails in Megatron 0.19.2; score"
    " further sets with --held-out NAME=PREFIX",
    "rampup_batch_size": "is ignored by Megatron 0.19.2; use --step-batch-size-schedule"
    f" {batch_schedule.FORM}, and --train-samples",
    "fake_process_group": "is for tests of Megatron; plan runs of other machines by --dry-run GPUS",
    "adlr_autoresume": "needs a package of NVIDIA's own clusters; restart with --load of --save",
    "moe_use_upcycling": "fails in Megatron 0.19.2; leave it out",
    "lazy_mpu_init": "leaves the process groups to a program of your own; leave it out",
    "rl_profile": "needs Megatron's RL package; leave it out",
    "encoder_seq_length": "is --seq-length by an older name; use --seq-length",
    "decoder_seq_length": "is of models with encoder and decoder; leave it out",
    "decoder_num_layers": "is of models with encoder and decoder; use --num-layers",
    "config_logger_dir": "fails in Megatron 0.19.2; leave it out",
    "fim_data": "is read by Megatron's own entry alone; leave it out",
    "freeze_all_layers": "is ignored by Megatron 0.19.2: the weights would train; leave it out",
    "inprocess_restart": "is of Megatron's own entry; mlra launch restarts a job that fails",
    "logits_save_dir": "leaves every loss at 0 in Megatron 0.19.2; leave it out",
    "logits_load_dir": "is read by the loss of Megatron's own entry alone; leave it out",
    "non_persistent_global_ckpt_dir": "is of checkpoints that are refused here; leave it out",
    "non_persistent_local_ckpt_dir": "is of checkpoints that are refused here; leave it out",
    "sft": "reads conversations; use --packed-sequences to keep documents apart",
    "perform_rl_step": "needs Megatron's RL package; leave it out",
}
"""Flags of Megatron that do not work here, by argparse destination, each with the reason and the
fix."""


POSITIVE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "seq_length",
    "vocab_size",
    "micro_batch_size",
    "global_batch_size",
    "train_iters",
    "train_samples",
    "lr_decay_iters",
    "lr_decay_samples",
    "log_interval",
    "eval_interval",
    "save_interval",
    "non_persistent_save_interval",
    "gpu_sniff_test_interval",
    "tensorboard_log_interval",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "tpa_q_rank",
    "tpa_kv_rank",
    "keep_last",
    "muon_num_ns_steps",
    "seed",
    "distributed_timeout_minutes",
    "distributed_timeout_seconds_after_init",
    "kv_channels",
    "num_query_groups",
    "recompute_num_layers",
    "rotary_seq_len_interpolation_factor",
    "make_vocab_size_divisible_by",
    "padded_vocab_size",
    "mlp_chunks_for_training",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "moe_router_topk",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "eval_global_batch_size",
    "eval_micro_batch_size",
    "iterations_to_skip",
    "check_weight_hash_across_dp_replicas_interval",
    "log_memory_interval",
    "save_params_interval",
    "save_activations_interval",
    "save_tokens_per_expert_interval",
    "save_wgrads_interval",
    "save_dgrads_interval",
    "save_retain_interval",
    "num_distributed_optimizer_instances",
    "num_dataset_builder_threads",
    "ddp_num_buckets",
    "ddp_bucket_size",
    "tensor_parallel_num_weight_shards",
    "expert_tensor_parallel_num_weight_shards",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "microbatch_group_size_per_vp_stage",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "loss_scale_window",
    "hysteresis",
    "fp8_interval",
    "fp8_amax_history_len",
    "dist_ckpt_workers",
)
"""Counts that are at least 1."""

AT_LEAST_0 = (
    "lr_warmup_iters",
    "lr_warmup_samples",
    "min_lr",
    "lr_warmup_init",
    "decoupled_min_lr",
    "weight_decay",
    "clip_grad",
    "mtp_loss_scaling_factor",
    "num_workers",
    "eval_iters",
    "exit_interval",
    "exit_duration_in_mins",
    "init_method_std",
    "embedding_init_method_std",
    "start_weight_decay",
    "end_weight_decay",
    "data_seed",
    "num_experts",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_samples",
    "manual_gc_interval",
    "train_sync_interval",
    "start_eval_at_iter",
    "profile_step_start",
    "profile_ranks",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
    "cuda_graph_warmup_steps",
    "wgrad_deferral_limit",
    "ckpt_step",
    "null_tokenizer_eod_id",
)

SHARES = (
    "adam_beta1",
    "adam_beta2",
    "lion_beta1",
    "lion_beta2",
    "sgd_momentum",
    "muon_momentum",
    "lr_warmup_fraction",
    "attention_dropout",
    "hidden_dropout",
)
"""Shares that are at least 0 and below 1."""

PARTS = (
    "rotary_percent",
    "optimizer_offload_fraction",
    "activation_offload_fraction",
    "moe_router_quantile_balancing_ema",
)
"""Shares that may be the whole."""

ABOVE_0 = (
    "muon_extra_scale_factor",
    "adam_eps",  # weights without a gradient, as of tokens that are not seen, become 0 / 0
    "loss_scale",
    "initial_loss_scale",
    "min_loss_scale",
    "mup_base_hidden_size",
    "mup_base_head_dim",
    "mup_width_mult",
    "mup_embedding_mult",
    "mup_output_mult",
    "rope_scaling_factor",
    "moe_router_topk_scaling_factor",
)

HUGE = (
    "train_iters",
    "eval_iters",
    "distributed_timeout_minutes",
    "distributed_timeout_seconds_after_init",
)
MOST = 10**9
"""Data of more steps are never listed to the end, and times of more overflow."""
LARGEST = 3.4e38
"""About the largest float32."""

SEEDS = ("seed", "data_seed")
MOST_SEED = 2**32 - 1
"""The largest seed that numpy takes."""


REQUIRED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "seq_length",
    "micro_batch_size",
    "lr",
)


PATTERNS = ("moe_layer_freq", "no_rope_freq", "window_attn_skip_freq", "linear_attention_freq")
"""Numbers N, or a 0 or 1 for each layer."""


def check_required(args: Namespace) -> None:
    """Refuse a run without one of the `REQUIRED` numbers, which have no defaults, or without the
    checkpoint of `--use-checkpoint-args`.

    Args:
        args: some or all arguments; one that is missing counts as None.

    Raises:
        ValueError: one line that names the flag.
    """
    for name in REQUIRED:
        if getattr(args, name, None) is None:
            if getattr(args, "use_checkpoint_args", None):
                raise ValueError(
                    f"{flag(name)} is missing, and --use-checkpoint-args takes no sizes of latent"
                    " attention from a checkpoint; give the preset of its run with --config"
                )
            raise ValueError(f"{flag(name)} is missing; give it, or a preset with --config")
    if getattr(args, "use_checkpoint_args", None) and getattr(args, "load", None) is None:
        raise ValueError("--use-checkpoint-args has no effect without --load; add it")


def check_values(args: Namespace) -> None:
    """Refuse values, and flags, that cannot work whatever the others are.

    Args:
        args: some or all arguments; one that is missing counts as None.

    Raises:
        ValueError: one line that names the flag and the fix.
    """
    for name, why in REPLACED.items():
        if getattr(args, name, None):
            raise ValueError(f"{flag(name)} {why}")
    _check_ranges(args)
    _check_patterns(args)
    for name in ("lr", "decoupled_lr"):
        if (lr := getattr(args, name, None)) is not None and lr <= 0:
            raise ValueError(f"{flag(name)} {lr:g} is not positive; use e.g. 3e-4")
    _check_saves(args)
    _check_start(args)
    if (text := getattr(args, batch_schedule.NAME, None)) is not None:
        batch_schedule.stages(text, getattr(args, "seq_length", None) or 1)
    if (seconds := getattr(args, "hang_timeout_seconds", None)) and seconds < 1:
        raise ValueError(
            f"--hang-timeout-seconds {seconds:g} is too short; use at least 1, or 0 for never"
        )
    if (split := getattr(args, "split", None)) is not None:
        if not re.fullmatch(r"\s*\d[\d.]*(\s*,\s*\d[\d.]*){0,2}", split):
            raise ValueError(f"--split {split} is not three shares such as 969,30,1")
        if not re.search("[1-9]", split):
            raise ValueError(f"--split {split} gives nothing to any part; use e.g. 969,30,1")


def _check_saves(args: Namespace) -> None:
    """Refuse saves that a resume here does not check, and a mode that Megatron only lists."""
    interval = getattr(args, "non_persistent_save_interval", None)
    kind = getattr(args, "non_persistent_ckpt_type", None)
    fix = f"save by --save-interval {interval or 'N'}; --save-retain-interval keeps every so many"
    if kind == "in_memory":
        raise ValueError(f"--non-persistent-ckpt-type in_memory is not in Megatron 0.19.2; {fix}")
    if kind is not None:
        raise ValueError(
            f"--non-persistent-ckpt-type {kind}: a resume would load its checkpoints without a"
            f" check, in place of what --ckpt-step names; {fix}"
        )
    if interval is not None:
        raise ValueError(
            f"--non-persistent-save-interval {interval} needs --non-persistent-ckpt-type; add"
            f" neither, since a resume would load such checkpoints without a check: {fix}"
        )
    if getattr(args, "rerun_mode", None) == "report_stats":
        raise ValueError(
            "--rerun-mode report_stats ends Megatron 0.19.2 at its start; use validate_results, or"
            " leave it out"
        )


def _check_start(args: Namespace) -> None:
    """Refuse what would end a run behind its start."""
    signal = getattr(args, "exit_signal", None)
    name = str(getattr(signal, "name", signal))  # text, before Megatron's parser
    if name in ("SIGKILL", "SIGSTOP"):
        raise ValueError(f"--exit-signal {name} cannot be caught by a process; use e.g. SIGTERM")
    tokenizer = getattr(args, "tokenizer_type", None)
    if tokenizer in ("MultimodalTokenizer", "NullMultimodalTokenizer"):
        raise ValueError(f"--tokenizer-type {tokenizer} is for images; use NullTokenizer")
    if getattr(args, "dataloader_type", None) == "external":
        raise ValueError(
            "--dataloader-type external takes data from a program of your own; use single or cyclic"
        )
    group = getattr(args, "sharp_enabled_group", None)
    if group is not None and not getattr(args, "use_sharp", None):
        raise ValueError(f"--sharp-enabled-group {group} has no effect without --use-sharp; add it")


def _check_ranges(args: Namespace) -> None:
    """Refuse numbers that are not finite, or out of the range of their flag."""
    for name, value in vars(args).items():
        values = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(each, float) and not math.isfinite(each) for each in values):
            raise ValueError(f"{flag(name)} is {value}; it must be a finite number")
        for each in values:
            if isinstance(each, float) and abs(each) > LARGEST:
                raise ValueError(f"{flag(name)} is {each:g}; it must be below {LARGEST:g}")
            if isinstance(each, int) and abs(each) >= 2**63:
                raise ValueError(f"{flag(name)} is {each}; it must be below 2^63")
    for names, fits, said in (
        (POSITIVE, lambda value: value >= 1, "at least 1"),
        (AT_LEAST_0, lambda value: value >= 0, "at least 0"),
        (SHARES, lambda value: 0 <= value < 1, "at least 0 and below 1"),
        (PARTS, lambda value: 0 <= value <= 1, "from 0 to 1"),
        (ABOVE_0, lambda value: value > 0, "above 0"),
        (("moe_input_jitter_eps",), lambda value: 0 < value < 1, "above 0 and below 1"),
        (("num_workers",), lambda value: value <= MOST_PROCESSES, f"at most {MOST_PROCESSES}"),
        (("muon_num_ns_steps",), lambda value: value <= 100, "at most 100"),  # usual are 5
        (HUGE, lambda value: value <= MOST, f"at most {MOST}"),
        (SEEDS, lambda value: value <= MOST_SEED, f"at most {MOST_SEED}"),
    ):
        for name in names:
            given = getattr(args, name, None)
            for value in given if isinstance(given, list | tuple) else (given,):
                if value is not None and not fits(value):
                    raise ValueError(f"{flag(name)} is {value}; it must be {said}")


def _check_patterns(args: Namespace) -> None:
    """Refuse what is no pattern of layers, as in a checkpoint."""
    for name in PATTERNS:
        value = getattr(args, name, None)
        if value is None or (type(value) is int and value > 0):
            continue
        if not isinstance(value, list) or any(bit not in (0, 1) for bit in value):
            raise ValueError(f"{flag(name)} is {value!r:.60}; use {FORM}")


def check_lengths(args: Namespace) -> None:
    """Refuse patterns of more or fewer layers than the model has.

    Args:
        args: some or all arguments; one that is missing counts as None.

    Raises:
        ValueError: one line that names the flag.
    """
    layers = getattr(args, "num_layers", None)
    for name in PATTERNS:
        value = getattr(args, name, None)
        if layers is not None and isinstance(value, list) and len(value) != layers:
            raise ValueError(f"{flag(name)} is of {len(value)} layers, not {layers}; use {FORM}")
