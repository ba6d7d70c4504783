"""Configuration of the latent attention family: MLA, GLA and MLRA are two integers apart.

Letters used in messages and docstrings: L `num_latent_heads`, N `num_branches`, G = L / N head groups,
h attention heads, d hidden size, d_c `kv_lora_rank`, d_l = d_c / L latent dim, d_q `q_lora_rank`,
d_h `qk_nope_head_dim`, d_r `qk_rope_head_dim`, d_v `v_head_dim`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.models.common.embeddings import _yarn_get_mscale
from megatron.core.transformer.transformer_config import MLATransformerConfig

TP_LAYOUTS = ("head", "latent")
CORE_FORMS = ("auto", "absorbed", "materialized")
CORE_BACKENDS = ("auto", "sdpa", "te")


@dataclass
class MLRAConfig(MLATransformerConfig):
    """A Megatron transformer whose attention is MLA, GLA-n or MLRA-n.

    MLA is (L, N) = (1, 1), GLA-2 (2, 1), GLA-4 (4, 1), MLRA-2 (4, 2), MLRA-4 (4, 4), MLRA-8 (8, 8).

    Raises:
        ValueError: for every combination that cannot work; the message names the value and one that does.
    """

    num_latent_heads: int = 4
    """Latent heads L that kv_lora_rank is cut into; each has its own norm and up-projection."""

    num_branches: int = 4
    """Latent heads N that serve each attention head; their attention outputs are summed."""

    output_gate: bool = False
    """Multiply the attention output by sigmoid(x W_G), elementwise, before the output projection."""

    variance_scaling: bool = True
    """Scale the query latent by sqrt(d / d_q), each latent head by sqrt(d / d_l) and the branch sum by
    N^-1/2. Off sets all three to 1."""

    zero_init_output: bool = True
    """Start the attention and MLP output projections at zero; off gives them init_method too."""

    latent_tp_layout: str = "head"
    """What a tensor-parallel rank owns of the core: 'head' (its heads, over all their latents) or
    'latent' (its latents, over all their heads)."""

    core_form: str = "auto"
    """'absorbed' attends in latent space (L key/value heads), 'materialized' expands keys and values for
    N h heads; 'auto' absorbs where that costs no FLOPs, i.e. where d_l <= d_h."""

    core_backend: str = "auto"
    """'sdpa' (torch), 'te' (Transformer Engine); 'auto' follows the layer specification."""

    rope_type: str = "rope"
    """'rope' or 'yarn'; the half-split pairing (i, i + d_r/2) either way."""

    def __post_init__(self) -> None:
        self.multi_latent_attention = True
        self._validate_variant()
        # Attention sizes its output projection by kv_channels and divides num_query_groups by TP.
        self.kv_channels = self.v_head_dim
        self.num_query_groups = self.num_attention_heads
        if self.init_method is None:
            self.init_method = partial(torch.nn.init.normal_, mean=0.0, std=self.init_method_std)
        self.output_layer_init_method = (
            torch.nn.init.zeros_ if self.zero_init_output else self.init_method
        )
        super().__post_init__()
        if self.softmax_scale is None:
            mscale = 1.0
            if self.rope_type == "yarn":
                mscale = _yarn_get_mscale(self.rotary_scaling_factor, self.mscale_all_dim)
            # Explicit: in absorbed form the dot product has d_l + d_r terms, not d_h + d_r.
            self.softmax_scale = mscale * mscale / math.sqrt(self.qk_dim)
        self._validate_parallel()
        self._validate_features()

    # -- derived sizes -------------------------------------------------------------------------------

    @property
    def qk_nope_head_dim(self) -> int:
        """d_h: query and key dims of a head without RoPE (Megatron's `qk_head_dim`)."""
        return self.qk_head_dim

    @property
    def qk_rope_head_dim(self) -> int:
        """d_r: dims of the RoPE query of a head and of the one shared RoPE key."""
        return self.qk_pos_emb_head_dim

    @property
    def qk_dim(self) -> int:
        """d_h + d_r: terms of a materialized attention score."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """d_l = d_c / L."""
        return self.kv_lora_rank // self.num_latent_heads

    @property
    def num_head_groups(self) -> int:
        """G = L / N: groups of heads that share their latents."""
        return self.num_latent_heads // self.num_branches

    @property
    def heads_per_group(self) -> int:
        """h / G: heads served by one latent head."""
        return self.num_attention_heads // self.num_head_groups

    @property
    def q_scale(self) -> float:
        """a_q = sqrt(d / d_q), or 1."""
        if not self.variance_scaling or self.q_lora_rank is None:
            return 1.0
        return math.sqrt(self.hidden_size / self.q_lora_rank)

    @property
    def kv_scale(self) -> float:
        """a_kv = sqrt(d / d_l), or 1."""
        return math.sqrt(self.hidden_size / self.latent_dim) if self.variance_scaling else 1.0

    @property
    def branch_scale(self) -> float:
        """N^-1/2, or 1."""
        return self.num_branches**-0.5 if self.variance_scaling else 1.0

    @property
    def absorbed(self) -> bool:
        """Whether the core runs in latent space (`core_form` resolved)."""
        if self.core_form == "auto":
            return self.latent_dim <= self.qk_nope_head_dim
        return self.core_form == "absorbed"

    @property
    def variant(self) -> str:
        """The paper's name of this (L, N): 'MLA', 'GLA-2', 'MLRA-4', ..."""
        if self.num_branches == 1:
            return "MLA" if self.num_latent_heads == 1 else f"GLA-{self.num_latent_heads}"
        return f"MLRA-{self.num_branches}"

    # -- validation ----------------------------------------------------------------------------------

    def _validate_variant(self) -> None:
        for name in (
            "num_latent_heads",
            "num_branches",
            "num_attention_heads",
            "hidden_size",
            "kv_lora_rank",
            "qk_head_dim",
            "qk_pos_emb_head_dim",
            "v_head_dim",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(
                f"q_lora_rank is {self.q_lora_rank}; use at least 1, or leave it out for a query"
                " projected straight from the hidden state"
            )
        L, N, h = self.num_latent_heads, self.num_branches, self.num_attention_heads
        if self.kv_lora_rank % L:
            raise ValueError(
                f"num_latent_heads {L} does not divide kv_lora_rank {self.kv_lora_rank}; use"
                f" num_latent_heads {_nearest_divisor(self.kv_lora_rank, L)} or kv_lora_rank"
                f" {_next_multiple(self.kv_lora_rank, L)}"
            )
        if L % N:
            raise ValueError(
                f"num_branches {N} does not divide num_latent_heads {L}; use num_branches"
                f" {_nearest_divisor(L, N)}"
            )
        G = L // N
        if h % G:
            raise ValueError(
                f"num_attention_heads {h} does not divide into {G} head groups (num_latent_heads"
                f" {L} / num_branches {N}); use num_attention_heads {_next_multiple(h, G)}"
            )
        if self.qk_pos_emb_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim {self.qk_pos_emb_head_dim} is odd and RoPE rotates pairs; use"
                f" {self.qk_pos_emb_head_dim + 1}"
            )
        for name, allowed in (
            ("latent_tp_layout", TP_LAYOUTS),
            ("core_form", CORE_FORMS),
            ("core_backend", CORE_BACKENDS),
            ("rope_type", ("rope", "yarn")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; use one of {', '.join(allowed)}")
        if self.rotary_base <= 0:
            raise ValueError(f"rotary_base is {self.rotary_base}; use a positive one, e.g. 10000")
        if self.rope_type == "yarn" and self.rotary_scaling_factor < 1:
            raise ValueError(
                f"rotary_scaling_factor is {self.rotary_scaling_factor}; YaRN extends a context, so use"
                " a factor of at least 1"
            )
        if self.rope_type == "rope" and self.rotary_percent != 1.0:
            raise ValueError(
                f"rotary_percent is {self.rotary_percent}; the RoPE dims are qk_rope_head_dim itself,"
                " so use 1.0 and set qk_rope_head_dim"
            )

    def _validate_parallel(self) -> None:
        tp, L, N, G = (
            self.tensor_model_parallel_size,
            self.num_latent_heads,
            self.num_branches,
            self.num_head_groups,
        )
        for name, value in (
            ("num_attention_heads", self.num_attention_heads),
            ("q_lora_rank", self.q_lora_rank),
            ("kv_lora_rank", self.kv_lora_rank),
            ("qk_rope_head_dim", self.qk_rope_head_dim),
        ):
            if value is not None and value % tp:
                raise ValueError(
                    f"tensor parallel size {tp} does not divide {name} {value}; use tensor parallel"
                    f" size {_nearest_divisor(value, tp)} or {name} {_next_multiple(value, tp)}"
                )
        if L % tp and tp % L:
            raise ValueError(
                f"tensor parallel size {tp} neither divides num_latent_heads {L} nor is a multiple of"
                f" it, so latents cannot be shared out evenly; use {_nearest_divisor(L, tp)}"
            )
        if self.latent_tp_layout == "head" and G % tp and tp % G:
            raise ValueError(
                f"tensor parallel size {tp} does not fit {G} head groups in the head layout; use"
                f" {_nearest_divisor(G, tp)} or a multiple of {G}"
            )
        if self.latent_tp_layout == "latent" and N % tp and tp % N:
            raise ValueError(
                f"tensor parallel size {tp} does not fit {N} branches in the latent layout; use"
                f" {_nearest_divisor(N, tp)} or a multiple of {N}, or latent_tp_layout head"
            )
        if self.context_parallel_size > 1:
            raise ValueError(
                f"context parallel size {self.context_parallel_size} is not supported by MLRA attention;"
                " use 1 and tensor, sequence or pipeline parallelism"
            )
        if self.fp8:
            ffn = self.ffn_hidden_size // tp
            if ffn % 16:
                raise ValueError(
                    f"ffn_hidden_size {self.ffn_hidden_size} at tensor parallel size {tp} is not a multiple"
                    f" of 16 a rank, which FP8 needs; use {_next_multiple(self.ffn_hidden_size, 16 * tp)}"
                )

    def _validate_features(self) -> None:
        refused = (
            (self.qk_layernorm, "qk_layernorm", "MLRA always normalises its latents; leave it out"),
            (self.attention_output_gate, "attention_output_gate", "use output_gate"),
            (self.apply_rope_fusion, "apply_rope_fusion", "use --no-rope-fusion"),
            (
                self.cache_mla_latents,
                "cache_mla_latents",
                "it is for Megatron's own MLA; leave it out",
            ),
            (
                self.mla_down_proj_fusion,
                "mla_down_proj_fusion",
                "it is for Megatron's own MLA; leave it out",
            ),
            (
                self.rotary_interleaved,
                "rotary_interleaved",
                "MLRA's RoPE is half-split; leave it out",
            ),
            (
                self.window_size is not None,
                "window_size",
                "MLRA attends to the whole past; leave it out",
            ),
            (self.softmax_type != "vanilla", "softmax_type", "use vanilla"),
            (self.normalization != "RMSNorm", "normalization", "use RMSNorm"),
            (self.apply_query_key_layer_scaling, "apply_query_key_layer_scaling", "leave it out"),
            (
                self.fine_grained_activation_offloading
                and bool(
                    {"qkv_linear", "core_attn", "attn_proj"} & set(self.offload_modules or ())
                ),
                "offload_modules",
                "MLRA attention does not offload; name other modules or use recompute_modules",
            ),
        )
        for is_set, name, fix in refused:
            if is_set:
                raise ValueError(f"{name} ({getattr(self, name)!r}) does not work with MLRA: {fix}")


def _next_multiple(value: int, factor: int) -> int:
    return -(-value // factor) * factor


def _nearest_divisor(value: int, wanted: int) -> int:
    """The divisor of `value` nearest to `wanted` (the larger of two equally near)."""
    divisors = [n for n in range(1, value + 1) if value % n == 0]
    return min(divisors, key=lambda n: (abs(n - wanted), -n))
