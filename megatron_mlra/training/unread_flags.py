"""Flags of Megatron 0.19.2 that `mlra pretrain` would take in silence, and nothing would read.

Megatron's parser has the flags of its RL package, of models with an encoder, of vision, and of its
own entry scripts. Flags that ask for what happens anyway (`--use-flash-attn`, `--use-mcore-models`,
a switch that is turned off) are taken, since launch scripts have them.
tests/unit/training/test_unread_flags.py compares the lists with Megatron's code.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_mlra.command_line.parser import flag

UNREAD = {
    "is read by Megatron's own entry alone; leave it out": (
        "check_for_spiky_loss", "per_dataset_sequences_path", "dataloader_fast_cache_load",
        "dataloader_defer_npy_index_mmap", "fim_prefix_token", "fim_middle_token",
        "fim_suffix_token", "fim_pad_token", "fim_eod_token", "logits_load_decode_threads",
        "logits_load_prefetch_factor", "logits_load_msc_prefetch_depth",
        "logits_load_kd_loss_alpha", "logits_load_ignore_errors", "inprocess_max_iterations",
        "inprocess_progress_watchdog_interval",
    ),
    "is ignored by Megatron 0.19.2; leave it out": (
        "openai_gelu", "onnx_safe", "exit_signal_handler_for_dataloader",
        "dist_ckpt_save_pre_mcore_014", "enable_full_sharding_in_hsdp",
    ),
    "is of Megatron's own inference; leave it out, and use mlra generate or mlra serve": (
        "inference_batch_times_seqlen_threshold", "max_tokens_to_oom", "use_legacy_static_engine",
        "inference_max_requests", "inference_dynamic_batching",
        "inference_text_gen_server_logging", "inference_wandb_logging", "inference_shards",
    ),
    "is of Megatron's RL package; leave it out": (
        "rl_prompts_per_eval", "rl_generation_lag", "rl_submission_granularity",
        "rl_consumption_granularity", "grpo_clamp_eps_lower", "grpo_clamp_eps_upper",
        "grpo_kl_beta", "grpo_entropy_term_weight", "grpo_filter_groups_with_same_reward",
        "langrl_env_config", "rl_default_temperature", "rl_default_top_p", "rl_default_top_k",
        "rl_kv_cache_management_mode", "rl_persist_cuda_graphs", "rl_partial_rollouts",
        "rl_importance_sampling_truncation_coef", "rl_sequence_packing_max_sequences_per_bin",
        "rl_sequence_packing_algo", "rl_training_cuda_graphs", "rl_verify_model_weights_swap",
        "rl_skip_bos_token", "rl_inference_parsers",
    ),
    "is of other models of Megatron (BERT, T5, retrieval, vision); leave it out": (
        "mask_prob", "short_seq_prob", "vocab_extra_ids", "ict_head_size",
        "biencoder_projection_dim", "biencoder_shared_query_context_model", "ict_load",
        "bert_load", "titles_data_path", "query_in_block_prob", "use_one_sent_docs",
        "evidence_data_path", "retriever_report_topk_accuracies", "retriever_score_scaling",
        "block_data_path", "embedding_path", "indexer_batch_size", "indexer_log_interval",
        "num_classes", "num_channels", "classes_fraction", "data_per_class_fraction",
        "head_lr_mult", "vision_backbone_type", "swin_backbone_type", "mask_type", "mask_factor",
        "iter_per_epoch", "dino_local_img_size", "dino_local_crops_number",
        "dino_head_hidden_size", "dino_bottleneck_size", "dino_freeze_last_layer",
        "dino_norm_last_layer", "dino_warmup_teacher_temp", "dino_teacher_temp",
        "dino_warmup_teacher_temp_epochs", "output_bert_embeddings", "bert_embedder_type",
    ),
}  # fmt: skip
"""Why a flag is refused -> its argparse destinations."""


def check_read(given: Namespace) -> None:
    """Refuse flags that nothing reads.

    Args:
        given: what a command line and its preset give; no defaults.

    Raises:
        ValueError: one line that names the flag.
    """
    for why, names in UNREAD.items():
        for name in names:
            if getattr(given, name, False) is not False:
                raise ValueError(f"{flag(name)} {why}")
