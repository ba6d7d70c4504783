"""The one description of a model: attention, sizes and scales, independent of storage and layout.

Checkpoints of every format, inference, costs and the planner all use it. Pure Python, so that
reading a folder or pricing a run needs neither torch nor Megatron. Letters: d hidden size, h
attention heads, L latent heads, N branches, d_q, d_c, d_h, d_r, d_v the sizes of a latent attention
(docs/notation.md).
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
"""Most layers, and most tensors of experts (2 per layer and expert), of a model: a table of the
names of more would fill the memory."""
MOST_POSITIONS = 2**31 - 1
YARN = (
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
"""Fields of YaRN, which are also the names of Megatron's arguments."""


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
"""Kind of attention -> sizes that it needs."""


_MAY_BE_ZERO = ("mscale", "mscale_all_dim")
"""Float fields that need not be positive."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, foreign or not convertible; one line with the fault and the fix."""


def check_layers(name: str, layers: Any, stored: int) -> None:
    """Refuse more layers than there are stored tensors, before a table of the layers is made.

    Args:
        name: of the number of layers, for the message.
        stored: number of stored tensors, or of layers in stacked tensors.

    Raises:
        CheckpointError: names both numbers.
    """
    if isinstance(layers, int) and layers > min(stored, MOST_LAYERS):
        raise CheckpointError(f"{name} is {layers}, and the weights are {stored} tensors")


@dataclass(frozen=True, kw_only=True)
class ModelDescription(LatentSizes, ExpertSizes):
    """A decoder with one kind of attention, dense or a mixture of experts.

    All models of the family have RMSNorm, RoPE (half-split pairs) and no biases, for which there
    are no fields. Sizes that an attention does not have stay 0. Checkpoints of 'mlra' and 'gqa' can
    be converted (`megatron_args.check_convertible`); all kinds can be priced.

    Raises:
        CheckpointError: a field is invalid.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int
    """Size of the vocabulary, without the rows that pad Megatron's embedding."""

    attention: str = "mlra"
    """'mlra' (MLA, GLA and MLRA), 'gqa' (MHA, MQA and GQA), 'gta', 'mfa' or 'tpa'."""

    num_latent_heads: int = 0
    """L of 'mlra'."""

    num_branches: int = 0
    """N of 'mlra'."""

    q_lora_rank: int | None = None
    """d_q of 'mlra' (None: queries are projected directly from the hidden state), and the shared
    query size of 'mfa'."""

    kv_lora_rank: int = 0
    """d_c of 'mlra'."""

    qk_nope_head_dim: int = 0
    """d_h of 'mlra'."""

    qk_rope_head_dim: int = 0
    """d_r of 'mlra' and 'gta'; 0 in 'mlra' means NoPE: no RoPE in any layer."""

    v_head_dim: int = 0
    """d_v of 'mlra'."""

    num_query_groups: int = 0
    """Key/value heads of 'gqa' and 'gta'."""

    head_dim: int = 0
    """Size of a query, key or value head of 'gqa' (all rotated by RoPE), 'gta', 'mfa' and 'tpa'."""

    tpa_q_rank: int = 0
    """R_q of 'tpa'."""

    tpa_kv_rank: int = 0
    """R_kv of 'tpa'."""

    qk_layernorm: bool = False
    """Of 'gqa': an RMSNorm on each query and key head."""

    query_head_norm: bool = False
    """Of 'mlra': an RMSNorm on each query head, before RoPE. Its keys are latents, which are
    normalised already."""

    output_gate: bool = False
    """sigmoid(x W_G) on the attention output ('mlra' and 'gqa')."""

    variance_scaling: bool = True
    """Of 'mlra': scale query latent, latents and branch sum; off sets all three scales to 1."""

    softmax_scale: float | None = None
    """Scale of attention scores; None becomes (d_h + d_r)^-1/2 (times YaRN's factor), or
    head_dim^-1/2."""

    rope_type: str = "rope"
    """'rope', or for 'mlra' 'yarn'."""

    no_rope_pattern: tuple[int, ...] = ()
    """1 for a layer that rotates nothing, 0 for one with RoPE; empty where all have it. Megatron's
    `no_rope_freq`: the RoPE dims stay, as dims without a position, and so do all sizes and t."""

    rotary_base: float = 10000.0
    rotary_scaling_factor: float = 1.0
    """YaRN: factor by which the context is extended."""

    original_max_position_embeddings: int = 4096
    """YaRN: context before the extension, in tokens."""

    beta_fast: float = 32.0
    """YaRN: pairs that rotate more often than this within the original context are unchanged."""

    beta_slow: float = 1.0
    """YaRN: pairs that rotate less often than this are stretched by the whole factor."""

    mscale: float = 1.0
    """YaRN: cos and sin are multiplied by m(mscale) / m(mscale_all_dim), where m(x) = 0.1 x
    ln(factor) + 1."""

    mscale_all_dim: float = 0.0
    """YaRN: see `mscale`; the default softmax_scale is multiplied by m(mscale_all_dim)^2."""

    mtp_num_layers: int = 0
    """m, number of tokens ahead that multi-token prediction adds."""

    mtp_use_repeated_layer: bool = False
    """Whether multi-token prediction uses one layer m times, and not m layers."""

    layernorm_epsilon: float = 1e-6
    swiglu: bool = True
    tie_embeddings: bool = True
    max_position_embeddings: int = 2048
    dtype: str = "float32"
    """Dtype of the stored weights."""

    tokenizer_type: str | None = None
    """Megatron's name of the tokenizer, or None if unknown."""

    tokenizer_model: str | None = None
    """Path of the tokenizer in training."""

    eod_token_id: int | None = None
    """Id of the end of a document, or None if unknown."""

    # -- execution; two models that differ only in these fields are equal -------------------------

    padded_vocab_size: int = field(default=0, compare=False)
    """Rows of the embedding if it is padded, else 0."""

    seq_length: int = field(default=0, compare=False)
    """Tokens of a training sequence if a run is priced, else 0."""

    core_form: str = field(default="auto", compare=False)
    """Of 'mlra': 'absorbed' or 'materialized' attention, or 'auto'."""

    def __post_init__(self) -> None:
        self._validate()
        if self.softmax_scale is None:
            object.__setattr__(self, "softmax_scale", self._default_softmax_scale())

    # -- derived -----------------------------------------------------------------------------------

    @property
    def variant(self) -> str:
        """The model's common name: 'MLA', 'GLA-2', 'MLRA-4', 'GQA', ..., then ' gated', ' MoE'."""
        return self.attention_variant + " MoE" * bool(self.num_experts)

    @property
    def attention_variant(self) -> str:
        """The common name without ' MoE'."""
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
        """V, rows of the embedding and of the output layer, padding included."""
        return self.padded_vocab_size or self.vocab_size

    @property
    def absorbed(self) -> bool:
        """Whether the core of 'mlra' attends in latent space; by default ('auto') if d_l <= d_h."""
        if self.core_form != "auto":
            return self.core_form == "absorbed"
        return self.attention == "mlra" and self.latent_dim <= self.qk_nope_head_dim

    @property
    def draft_layers(self) -> int:
        """Layers of multi-token prediction: one a token ahead, or one for all."""
        return min(self.mtp_num_layers, 1) if self.mtp_use_repeated_layer else self.mtp_num_layers

    def rotates(self, layer: int) -> bool:
        """Whether a layer rotates its RoPE dims."""
        return not (self.no_rope_pattern and self.no_rope_pattern[layer])

    def replace(self, **changes: Any) -> ModelDescription:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def decoder(self) -> ModelDescription:
        """A copy without the layers of multi-token prediction."""
        return self.replace(mtp_num_layers=0, mtp_use_repeated_layer=False)

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
            ("attention", self.attention in ("gta", "mfa", "tpa"), "use mlra or gqa"),
            ("rope_type", self.rope_type != "rope", "use rope"),
            ("mtp_num_layers", latent and self.mtp_num_layers, "leave it out"),
            ("qk_rope_head_dim", latent and not self.qk_rope_head_dim, "leave no_rope_freq out"),
        ):
            if wrong:
                return f"{name} {getattr(self, name)!r} does not go with no_rope_freq: {fix}"
        return None

    def _check_types(self) -> None:
        """Check the types of all fields (a text "false" would count as true), and that numbers are
        finite and, with few exceptions, positive."""
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
        """(name, divisor, name, multiple) of all sizes that must divide another size."""
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
            # YaRN, equation 22, with DeepSeek-V2's mscale_all_dim. Squared, since the factor
            # belongs to both q and k.
            factor = 0.1 * self.mscale_all_dim * math.log(self.rotary_scaling_factor) + 1.0
        return factor * factor / math.sqrt(self.qk_nope_head_dim + self.qk_rope_head_dim)
