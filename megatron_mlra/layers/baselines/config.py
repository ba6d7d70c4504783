"""Configuration of the attentions MLRA is compared with: MHA, MQA, GQA, GTA, MFA, TPA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mlra.description.backends import current_name

BASELINES = ("gqa", "gta", "mfa", "tpa")


@dataclass
class BaselineConfig(TransformerConfig):
    """A Megatron transformer with a baseline's attention.

    Raises:
        ValueError: for combinations that cannot work; the message names the value and one that
        does.
    """

    attention: str = "gqa"
    """'gqa' (Megatron's own: MHA, MQA, GQA by num_query_groups), 'gta', 'mfa' or 'tpa'."""

    q_lora_rank: int | None = None
    """MFA: size of the query projection that all heads share."""

    qk_pos_emb_head_dim: int = 64
    """GTA: dims of the shared RoPE key, and of the last part of a query, which it multiplies."""

    tpa_q_rank: int = 6
    """TPA: rank of the queries' factorisation."""

    tpa_kv_rank: int = 2
    """TPA: rank of the keys' and of the values' factorisation."""

    rotary_base: float = 10000
    """Base of the RoPE frequencies."""

    zero_init_output: bool = True
    """Start the attention and MLP output projections at zero. Off: init_method, as elsewhere."""

    core_backend: str = "auto"
    """Core of GTA, MFA and TPA: 'torch' or 'auto', both torch."""

    def __post_init__(self) -> None:
        if self.attention not in BASELINES:
            raise ValueError(
                f"attention is {self.attention!r}; use one of {', '.join(BASELINES)}, or mlra"
            )
        self.core_backend = current_name("core_backend", self.core_backend)
        if self.kv_channels is None:
            self.kv_channels = self.hidden_size // self.num_attention_heads
        if self.num_query_groups is None or self.attention in ("mfa", "tpa"):
            # Megatron divides this by TP. MFA's one key head is whole on every rank, not divided.
            self.num_query_groups = self.num_attention_heads
        self._validate_heads()
        self._validate_tensor_parallel()
        if self.attention != "gqa":
            self._validate_features()
        elif self.context_parallel_size > 1 and self.transformer_impl == "local":
            raise ValueError(
                f"context_parallel_size {self.context_parallel_size} needs transformer_impl"
                " transformer_engine with gqa; use 1"
            )
        if self.init_method is None:
            self.init_method = partial(torch.nn.init.normal_, mean=0.0, std=self.init_method_std)
        if self.zero_init_output:
            self.output_layer_init_method = torch.nn.init.zeros_
        else:
            self.output_layer_init_method = self.init_method
        super().__post_init__()
        if self.softmax_scale is None:
            self.softmax_scale = 1.0 / math.sqrt(self.kv_channels)

    def _validate_heads(self) -> None:
        h, g, c = self.num_attention_heads, self.num_query_groups, self.kv_channels
        if h % g:
            raise ValueError(
                f"num_query_groups {g} does not divide num_attention_heads {h};"
                f" use {math.gcd(g, h)}"
            )
        rope_dim = self.qk_pos_emb_head_dim if self.attention == "gta" else c
        if rope_dim % 2:
            name = "qk_pos_emb_head_dim" if self.attention == "gta" else "kv_channels"
            raise ValueError(f"{name} {rope_dim} is odd and RoPE rotates pairs; use {rope_dim + 1}")
        if self.attention == "gta" and not 0 < rope_dim < c:
            raise ValueError(
                f"qk_pos_emb_head_dim {rope_dim} must be less than kv_channels {c}; use {c // 2}"
            )
        if self.attention == "mfa" and not self.q_lora_rank:
            raise ValueError("attention mfa needs q_lora_rank, e.g. 2048 at hidden size 3072")
        for name in ("tpa_q_rank", "tpa_kv_rank"):
            if self.attention == "tpa" and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use at least 1")

    def _validate_tensor_parallel(self) -> None:
        tp, sizes = self.tensor_model_parallel_size, self._sharded_sizes()

        def fits(tp: int) -> bool:
            g = self.num_query_groups
            groups = self.attention != "gqa" or g % tp == 0 or tp % g == 0
            return groups and all(size % tp == 0 for size in sizes.values())

        if not fits(tp):
            misfits = [f"{name} {size}" for name, size in sizes.items() if size % tp]
            misfit = misfits[0] if misfits else f"num_query_groups {self.num_query_groups}"
            works = max(n for n in range(1, tp) if fits(n))
            raise ValueError(
                f"tensor parallel size {tp} does not divide {misfit} of attention {self.attention};"
                f" use tensor parallel size {works}"
            )

    def _sharded_sizes(self) -> dict[str, int]:
        """The sizes that tensor parallelism cuts, by the names that messages use."""
        sizes = {"num_attention_heads": self.num_attention_heads}
        if self.attention == "gta":
            sizes["num_query_groups"] = self.num_query_groups
            sizes["qk_pos_emb_head_dim"] = self.qk_pos_emb_head_dim
        elif self.attention == "mfa":
            sizes["q_lora_rank"] = self.q_lora_rank
            sizes["2 * kv_channels"] = 2 * self.kv_channels
        elif self.attention == "tpa":
            sizes["tpa_q_rank * kv_channels"] = self.tpa_q_rank * self.kv_channels
            sizes["tpa_kv_rank * kv_channels"] = self.tpa_kv_rank * self.kv_channels
        return sizes

    def _validate_features(self) -> None:
        for wrong, name, fix in (
            (self.core_backend not in ("auto", "torch"), "core_backend", "use torch or auto"),
            (self.context_parallel_size > 1, "context_parallel_size", "use 1"),
            (self.attention_output_gate, "attention_output_gate", "leave it out, or use gqa"),
            (self.qk_layernorm, "qk_layernorm", "leave it out, or use gqa"),
            (self.rotary_interleaved, "rotary_interleaved", "its RoPE is half-split; leave it out"),
            (self.window_size is not None, "window_size", "leave it out"),
            (self.no_rope_freq is not None, "no_rope_freq", "leave it out"),
            (
                self.fine_grained_activation_offloading
                and {"qkv_linear", "core_attn", "attn_proj"} & set(self.offload_modules or ()),
                "offload_modules",
                "offload attn_norm, mlp_norm or the experts' modules alone, or use mlra or gqa",
            ),
            (
                self.overlap_moe_expert_parallel_comm,
                "overlap_moe_expert_parallel_comm",
                "leave it out, or use mlra or gqa",
            ),
        ):
            if wrong:
                value = getattr(self, name)
                raise ValueError(f"{name} ({value!r}) does not work with {self.attention}: {fix}")
