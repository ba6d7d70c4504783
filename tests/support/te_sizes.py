"""Config values of a model whose sizes Transformer Engine supports."""

from __future__ import annotations

import torch

SIZES = {
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 256,
    "qk_head_dim": 64,
    "qk_pos_emb_head_dim": 32,
    "v_head_dim": 64,
    "bf16": True,
    "params_dtype": torch.bfloat16,
    "pipeline_dtype": torch.bfloat16,
    "use_cpu_initialization": False,
    "zero_init_output": False,
    "init_method_std": 0.05,
}
