"""The one description of a model: its attention, sizes and scales, apart from storage and layout.

Everything else that speaks of a model reads it from here: checkpoints of every format, inference,
costs, the planner. Pure Python, so that reading a folder or pricing a run needs neither torch nor
Megatron. Letters: d hidden size, h attention heads, L latent heads, N branches, d_q, d_c, d_h, d_r,
d_v the sizes of a latent attention (docs/numerics.md).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from megatron_mlra.description.experts import ExpertSizes
from megatron_mlra.description.latent import LatentSizes

ATTENTIONS = ("mlra", "gqa", "gta", "mfa", "tpa")
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


_SIZES = {
    "mlra": (
        *("num_latent_heads", "num_branches", "kv_lora_rank"),
        *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    ),
    "gqa": ("num_query_groups", "head_dim"),
    "gta": ("num_query_groups", "head_dim", "qk_rope_head_dim"),
    "mfa": ("q_lora_rank", "head_dim"),
    "tpa": ("head_dim", "tpa_q_rank", "tpa_kv_rank"),
}
"""Sizes that each kind of attention needs."""


_MAY_BE_ZERO = ("mscale", "mscale_all_dim")
"""Numbers with a fraction that need not be positive."""


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
    """A decoder with one kind of attention, dense or a mixture of experts.

    RMSNorm, RoPE (half-split pairs) and no biases are the family's, so they have no field. Sizes
    that an attention does not have stay 0. Checkpoints of 'mlra' and 'gqa' can be converted
    (`megatron_args.check_convertible`); all kinds can be priced.

    Raises:
        CheckpointError: for sizes that make no model.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int
    """The true size, without the rows that pad Megatron's embedding."""

    attention: str = "mlra"
    """'mlra' (MLA, GLA and MLRA), 'gqa' (MHA, MQA and GQA), 'gta', 'mfa' or 'tpa'."""

    num_latent_heads: int = 0
    """L of 'mlra'."""

    num_branches: int = 0
    """N of 'mlra'."""

    q_lora_rank: int | None = None
    """d_q of 'mlra' (None projects queries straight from the hidden state), and the shared query
    size of 'mfa'."""

    kv_lora_rank: int = 0
    """d_c of 'mlra'."""

    qk_nope_head_dim: int = 0
    """d_h of 'mlra'."""

    qk_rope_head_dim: int = 0
    """d_r of 'mlra' and 'gta'; 0 in 'mlra' is NoPE: no layer rotates anything."""

    v_head_dim: int = 0
    """d_v of 'mlra'."""

    num_query_groups: int = 0
    """Key/value heads of 'gqa' and 'gta'."""

    head_dim: int = 0
    """Dims of a query, key or value head of 'gqa' (RoPE turns all of them), 'gta', 'mfa', 'tpa'."""

    tpa_q_rank: int = 0
    tpa_kv_rank: int = 0

    qk_layernorm: bool = False
    """Of 'gqa': an RMSNorm on each query and key head."""

    query_head_norm: bool = False
    """Of 'mlra': an RMSNorm on each query head, before RoPE. Its keys are latents, which are
    normalised already."""

    output_gate: bool = False
    """sigmoid(x W_G) on the attention output ('mlra' and 'gqa')."""

    variance_scaling: bool = True
    """Of 'mlra': scale query latent, latents and branch sum; off sets all three to 1."""

    softmax_scale: float | None = None
    """t; None becomes (d_h + d_r)^-1/2 (times YaRN's factor) or head_dim^-1/2."""

    rope_type: str = "rope"
    """'rope', or for 'mlra' 'yarn'."""

    no_rope_pattern: tuple[int, ...] = ()
    """1 for a layer that rotates nothing, 0 for one with RoPE; empty where all have it. Megatron's
    `no_rope_freq`: the RoPE dims stay, as dims without a position, and so do all sizes and t."""

    rotary_base: float = 10000.0
    rotary_scaling_factor: float = 1.0
    """YaRN: how far the context is extended."""

    original_max_position_embeddings: int = 4096
    """YaRN: context before the extension."""

    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    mtp_num_layers: int = 0
    """m: layers behind the decoder that predict further tokens (multi-token prediction)."""

    mtp_use_repeated_layer: bool = False
    """Whether one layer does for all m of them."""

    layernorm_epsilon: float = 1e-6
    swiglu: bool = True
    tie_embeddings: bool = True
    max_position_embeddings: int = 2048
    dtype: str = "float32"
    """Of the stored weights."""

    tokenizer_type: str | None = None
    """Megatron's name of the tokenizer, or None where the source names none."""

    tokenizer_model: str | None = None
    """Where the tokenizer was read from when the model was trained."""

    eod_token_id: int | None = None

    # -- how it is run; two models that differ in these alone are the same ------------------------

    padded_vocab_size: int = field(default=0, compare=False)
    """Rows of the embedding where it is padded, else 0."""

    seq_length: int = field(default=0, compare=False)
    """Tokens of a training sequence where a run is priced, else 0."""

    core_form: str = field(default="auto", compare=False)
    """Of 'mlra': 'absorbed' or 'materialized' attention, or 'auto'."""

    def __post_init__(self) -> None:
        self._validate()
        if self.softmax_scale is None:
            object.__setattr__(self, "softmax_scale", self._default_softmax_scale())

    # -- derived -----------------------------------------------------------------------------------

    @property
    def variant(self) -> str:
        """The name people use: 'MLA', 'GLA-2', 'MLRA-4', 'GQA', ..., then ' gated', ' MoE'."""
        return self.attention_variant + " MoE" * bool(self.num_experts)

    @property
    def attention_variant(self) -> str:
        """The variant without ' MoE'."""
        if self.attention == "gqa":
            name = {1: "MQA", self.num_attention_heads: "MHA"}.get(self.num_query_groups, "GQA")
        elif self.attention != "mlra":
            name = self.attention.upper()
        elif self.num_branches > 1:
            name = f"MLRA-{self.num_branches}"
        else:
            name = f"GLA-{self.num_latent_heads}" if self.num_latent_heads > 1 else "MLA"
        return name + " gated" * self.output_gate

    @property
    def embedding_rows(self) -> int:
        """V: rows of the embedding and of the output layer, padding among them."""
        return self.padded_vocab_size or self.vocab_size

    @property
    def absorbed(self) -> bool:
        """Whether the core of 'mlra' attends in latent space; 'auto' does where d_l <= d_h."""
        if self.core_form != "auto":
            return self.core_form == "absorbed"
        return self.attention == "mlra" and self.latent_dim <= self.qk_nope_head_dim

    def rotates(self, layer: int) -> bool:
        """Whether a layer rotates its RoPE dims."""
        return not (self.no_rope_pattern and self.no_rope_pattern[layer])

    def replace(self, **changes: Any) -> ModelDescription:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    # -- validation --------------------------------------------------------------------------------

    def _validate(self) -> None:
        if self.attention not in ATTENTIONS:
            raise CheckpointError(
                f"attention is {self.attention!r}; use one of {', '.join(ATTENTIONS)}"
            )
        sizes = ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"]
        sizes += ["vocab_size", "max_position_embeddings", "mtp_num_layers"]
        sizes += _SIZES[self.attention]
        if self.attention == "mlra" and self.q_lora_rank is not None:
            sizes.append("q_lora_rank")
        for name in sizes:
            value = getattr(self, name)
            may_be_zero = (self.attention, name) == ("mlra", "qk_rope_head_dim")
            least = 0 if may_be_zero or name == "mtp_num_layers" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise CheckpointError(
                    f"{name} is {value!r}; it must be a whole number of at least {least}"
                )
        for name, most in (
            ("num_layers", MOST_LAYERS),
            ("mtp_num_layers", MOST_LAYERS),
            ("max_position_embeddings", MOST_POSITIONS),
        ):
            if getattr(self, name) > most:
                raise CheckpointError(f"{name} is {getattr(self, name)}; it can be at most {most}")
        for name, allowed in (
            ("dtype", DTYPES),
            ("rope_type", ("rope", "yarn")),
            ("core_form", ("auto", "absorbed", "materialized")),
        ):
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise CheckpointError(f"{name} is {value!r}; use one of {', '.join(allowed)}")
        self._check_types()
        if self.attention != "mlra" and self.rope_type != "rope":
            raise CheckpointError(f"rope_type {self.rope_type!r} needs latent attention")
        if self.attention == "mlra" and not self.qk_rope_head_dim and self.rope_type != "rope":
            raise CheckpointError(
                f"rope_type {self.rope_type!r} stretches RoPE, and qk_rope_head_dim is 0: use rope"
            )
        if self.query_head_norm and self.attention != "mlra":
            raise CheckpointError(
                f"query_head_norm needs latent attention, and attention is {self.attention}; leave"
                " it out, or with gqa use qk_layernorm"
            )
        if problem := self._pattern_problem():
            raise CheckpointError(problem)
        for name, part, whole_name, whole in self._divisors():
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

    def _pattern_problem(self) -> str | None:
        """One line if the layers without RoPE make no model."""
        pattern = self.no_rope_pattern
        if not pattern:
            return None
        if len(pattern) != self.num_layers or set(pattern) - {0, 1}:
            return (
                f"no_rope_pattern is {list(pattern)!r:.200}; it needs a 0 or 1 for each of"
                f" {self.num_layers} layers"
            )
        latent = self.attention == "mlra"
        for name, wrong, fix in (
            ("rope_type", self.rope_type != "rope", "use rope"),
            ("mtp_num_layers", latent and self.mtp_num_layers, "leave it out"),
            ("qk_rope_head_dim", latent and not self.qk_rope_head_dim, "leave no_rope_freq out"),
        ):
            if wrong:
                return f"{name} {getattr(self, name)!r} does not go with no_rope_freq: {fix}"
        return None

    def _check_types(self) -> None:
        """Switches are true or false (a text "false" would count as true), numbers are finite."""
        for entry in dataclasses.fields(self):
            name, kind, value = entry.name, str(entry.type), getattr(self, entry.name)
            if value is None and "None" in kind:
                continue
            if kind == "bool" and not isinstance(value, bool):
                raise CheckpointError(f"{name} is {value!r}; it must be true or false")
            if kind.startswith("str") and not isinstance(value, str):
                raise CheckpointError(f"{name} is {value!r:.60}; it must be a text")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if kind.startswith("int") and not (number and isinstance(value, int)):
                raise CheckpointError(f"{name} is {value!r}; it must be a whole number")
            if not kind.startswith("float"):
                continue
            if not number or not math.isfinite(value):
                raise CheckpointError(f"{name} is {value!r}; it must be a finite number")
            if value <= 0 and name not in _MAY_BE_ZERO:
                raise CheckpointError(f"{name} is {value!r}; it must be positive")

    def _divisors(self) -> list[tuple[str, int, str, int]]:
        """(name, part, name, whole) of everything that must divide."""
        h = self.num_attention_heads
        if self.attention == "mlra":
            L, N = self.num_latent_heads, self.num_branches
            return [
                ("num_latent_heads", L, "kv_lora_rank", self.kv_lora_rank),
                ("num_branches", N, "num_latent_heads", L),
                ("num_latent_heads / num_branches", max(L // N, 1), "num_attention_heads", h),
                ("2", 2, "qk_rope_head_dim", self.qk_rope_head_dim),
            ]
        if self.attention == "gqa":
            groups = self.num_query_groups
            return [
                ("num_query_groups", groups, "num_attention_heads", h),
                ("2", 2, "head_dim", self.head_dim),
            ]
        return []

    def _default_softmax_scale(self) -> float:
        if self.attention != "mlra":
            return self.head_dim**-0.5
        factor = 1.0
        if self.rope_type == "yarn" and self.rotary_scaling_factor > 1:
            # YaRN, equation 22, with DeepSeek-V2's mscale_all_dim; squared, as q and k both had it.
            factor = 0.1 * self.mscale_all_dim * math.log(self.rotary_scaling_factor) + 1.0
        return factor * factor / math.sqrt(self.qk_nope_head_dim + self.qk_rope_head_dim)
