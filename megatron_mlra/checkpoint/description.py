"""What a checkpoint's weights are a function of: the model, apart from how it is stored or run.

Pure Python, so that reading a folder needs neither torch nor Megatron. Letters as in config.py.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from megatron_mlra.checkpoint.experts import ExpertSizes, expert_args
from megatron_mlra.latent_sizes import LatentSizes

ATTENTIONS = ("latent", "gqa")
DTYPES = ("float32", "bfloat16", "float16")
MOST_LAYERS = 10_000
MOST_TENSORS = 1_000_000
"""Layers, and tensors with one per layer and expert, beyond which no model is described: a table of
their names would fill the memory."""
MOST_POSITIONS = 2**31 - 1
YARN = (
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
"""Fields, and Megatron's arguments, of YaRN."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, foreign or not convertible; one line, names what and the fix."""


def check_layers(name: str, layers: Any, stored: int) -> None:
    """Refuse a number of layers that the stored tensors cannot make, before a table of it is.

    Args:
        name: of the number, for the message.
        stored: tensors, or layers of stacked ones, that there are.

    Raises:
        CheckpointError: names both numbers.
    """
    if isinstance(layers, int) and layers > min(stored, MOST_LAYERS):
        raise CheckpointError(f"{name} is {layers}, and the weights are {stored} tensors")


@dataclass(frozen=True, kw_only=True)
class ModelDescription(LatentSizes, ExpertSizes):
    """A decoder with latent attention (MLA, GLA, MLRA) or grouped queries (MHA, MQA, GQA), dense or
    a mixture of experts.

    RMSNorm, SwiGLU, RoPE (half-split pairs) and no biases are the family's, so they have no field.

    Raises:
        CheckpointError: for sizes that make no model.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int
    """The true size, without the rows that pad Megatron's embedding."""

    attention: str = "latent"
    """'latent' (MLA, GLA, MLRA) or 'gqa' (MHA, MQA, GQA)."""

    num_latent_heads: int = 0
    """L of 'latent'."""

    num_branches: int = 0
    """N of 'latent'."""

    q_lora_rank: int | None = None
    """d_q of 'latent'; None projects queries straight from the hidden state."""

    kv_lora_rank: int = 0
    """d_c of 'latent'."""

    qk_nope_head_dim: int = 0
    """d_h of 'latent'."""

    qk_rope_head_dim: int = 0
    """d_r of 'latent'."""

    v_head_dim: int = 0
    """d_v of 'latent'."""

    num_query_groups: int = 0
    """Key/value heads of 'gqa'."""

    head_dim: int = 0
    """Dims of a query, key or value head of 'gqa'; RoPE turns all of them."""

    output_gate: bool = False
    """sigmoid(x W_G) on the attention output."""

    variance_scaling: bool = True
    """Of 'latent': scale query latent, latents and branch sum; off sets all three to 1."""

    softmax_scale: float | None = None
    """t; None becomes (d_h + d_r)^-1/2 (times YaRN's factor) or head_dim^-1/2."""

    rope_type: str = "rope"
    """'rope', or for 'latent' 'yarn'."""

    rotary_base: float = 10000.0
    rotary_scaling_factor: float = 1.0
    """YaRN: how far the context is extended."""

    original_max_position_embeddings: int = 4096
    """YaRN: context before the extension."""

    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    layernorm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    max_position_embeddings: int = 2048
    dtype: str = "float32"
    """Of the stored weights."""

    tokenizer_type: str | None = None
    """Megatron's name of the tokenizer, or None where the source names none."""

    tokenizer_model: str | None = None
    """Where the tokenizer was read from when the model was trained."""

    eod_token_id: int | None = None

    def __post_init__(self) -> None:
        self._validate()
        if self.softmax_scale is None:
            object.__setattr__(self, "softmax_scale", self._default_softmax_scale())

    # -- derived -----------------------------------------------------------------------------------

    @property
    def variant(self) -> str:
        """The name people use: 'MLA', 'GLA-2', 'MLRA-4', 'GQA', ..., then ' gated', ' MoE'."""
        if self.attention == "gqa":
            name = {1: "MQA", self.num_attention_heads: "MHA"}.get(self.num_query_groups, "GQA")
        elif self.num_branches > 1:
            name = f"MLRA-{self.num_branches}"
        else:
            name = f"GLA-{self.num_latent_heads}" if self.num_latent_heads > 1 else "MLA"
        return name + " gated" * self.output_gate + " MoE" * bool(self.num_experts)

    # -- from and to Megatron ----------------------------------------------------------------------

    @classmethod
    def from_megatron_args(cls, args: Any, **overrides: Any) -> ModelDescription:
        """The model that a Megatron run's arguments (a namespace or mapping) describe.

        `overrides` are fields of this class and win.

        Raises:
            CheckpointError: for arguments of a model this class cannot describe, named.
        """
        from megatron_mlra.checkpoint.megatron_args import description_fields

        return cls(**description_fields(args) | overrides)

    def to_megatron_args(self) -> dict[str, Any]:
        """The arguments that `pretrain_mlra.py` builds this model from; no layout, no training.

        `params_dtype` stays text, and `padded_vocab_size` is the writer's to choose.
        """
        from megatron_mlra.checkpoint.megatron_args import megatron_args

        return megatron_args(self)

    def to_config(self, **overrides: Any) -> Any:
        """The transformer config: MLRAConfig, or BaselineConfig for 'gqa'. Imports Megatron.

        `overrides` are fields of that config (layout, precision, backend) and win.
        """
        import torch

        from megatron_mlra.baseline_config import BaselineConfig
        from megatron_mlra.config import MLRAConfig

        dtype = getattr(torch, self.dtype)
        fields: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "num_layers",
                "hidden_size",
                "ffn_hidden_size",
                "num_attention_heads",
                "layernorm_epsilon",
                "softmax_scale",
                "rotary_base",
            )
        }
        fields |= {
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "params_dtype": dtype,
            "pipeline_dtype": dtype,
            "bf16": self.dtype == "bfloat16",
            "fp16": self.dtype == "float16",
        }
        experts = expert_args(self)
        if experts:
            fields |= {"num_moe_experts": experts.pop("num_experts"), **experts}
            fields["moe_router_load_balancing_type"] = "none"
        if self.attention == "gqa":
            fields |= {
                "attention": "gqa",
                "num_query_groups": self.num_query_groups,
                "kv_channels": self.head_dim,
                "attention_output_gate": self.output_gate,
            }
            return BaselineConfig(**fields | overrides)
        names = ("num_latent_heads", "num_branches", "q_lora_rank", "kv_lora_rank", "v_head_dim")
        names += ("output_gate", "variance_scaling", "rope_type", *YARN)
        fields |= {name: getattr(self, name) for name in names}
        fields |= {
            "qk_head_dim": self.qk_nope_head_dim,
            "qk_pos_emb_head_dim": self.qk_rope_head_dim,
        }
        return MLRAConfig(**fields | overrides)

    def replace(self, **changes: Any) -> ModelDescription:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    # -- validation --------------------------------------------------------------------------------

    def _validate(self) -> None:
        sizes = ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"]
        sizes += ["vocab_size", "max_position_embeddings"]
        if self.attention == "latent":
            sizes += ["num_latent_heads", "num_branches", "kv_lora_rank"]
            sizes += ["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
            if self.q_lora_rank is not None:
                sizes.append("q_lora_rank")
        elif self.attention == "gqa":
            sizes += ["num_query_groups", "head_dim"]
        else:
            raise CheckpointError(f"attention is {self.attention!r}; use one of {ATTENTIONS}")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(
                    f"{name} is {value!r}; it must be a whole number of at least 1"
                )
        for name, most in (
            ("num_layers", MOST_LAYERS),
            ("max_position_embeddings", MOST_POSITIONS),
        ):
            if getattr(self, name) > most:
                raise CheckpointError(f"{name} is {getattr(self, name)}; it can be at most {most}")
        for name, allowed in (("dtype", DTYPES), ("rope_type", ("rope", "yarn"))):
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise CheckpointError(f"{name} is {value!r}; use one of {', '.join(allowed)}")
        h = self.num_attention_heads
        if self.attention == "gqa":
            divides = [("num_query_groups", self.num_query_groups, "num_attention_heads", h)]
            divides.append(("2", 2, "head_dim", self.head_dim))
            if self.rope_type != "rope":
                raise CheckpointError(f"rope_type {self.rope_type!r} needs latent attention")
        else:
            L, N = self.num_latent_heads, self.num_branches
            divides = [
                ("num_latent_heads", L, "kv_lora_rank", self.kv_lora_rank),
                ("num_branches", N, "num_latent_heads", L),
                ("num_latent_heads / num_branches", max(L // N, 1), "num_attention_heads", h),
                ("2", 2, "qk_rope_head_dim", self.qk_rope_head_dim),
            ]
        for name, part, whole_name, whole in divides:
            if whole % part:
                shown = name if name == "2" else f"{name} {part}"
                raise CheckpointError(f"{shown} does not divide {whole_name} {whole}")
        problem = self.experts_problem(self.num_layers)
        if problem:
            raise CheckpointError(problem)
        tensors = 2 * self.num_experts * sum(self.moe_layer_pattern)
        if tensors > MOST_TENSORS:
            raise CheckpointError(
                f"num_experts is {self.num_experts}: {tensors} tensors, of at most {MOST_TENSORS}"
            )

    def _default_softmax_scale(self) -> float:
        if self.attention == "gqa":
            return self.head_dim**-0.5
        factor = 1.0
        if self.rope_type == "yarn" and self.rotary_scaling_factor > 1:
            # YaRN, equation 22, with DeepSeek-V2's mscale_all_dim; squared, as q and k both had it.
            factor = 0.1 * self.mscale_all_dim * math.log(self.rotary_scaling_factor) + 1.0
        return factor * factor / math.sqrt(self.qk_nope_head_dim + self.qk_rope_head_dim)
