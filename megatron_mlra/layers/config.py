"""Configuration of the latent attention family: two integers choose among MLA, GLA and MLRA.

Letters used in messages and docstrings: L `num_latent_heads`, N `num_branches`, G = L / N head
groups, h attention heads, d hidden size, d_c `kv_lora_rank`, d_l = d_c / L latent dim, d_q
`q_lora_rank`, d_h `qk_nope_head_dim`, d_r `qk_rope_head_dim`, d_v `v_head_dim`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.models.common.embeddings import _yarn_get_mscale
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_mlra.description.backends import (
    CORE_BACKENDS,
    CORE_FORMS,
    FP8_LINEARS,
    LATENT_KERNELS,
    TP_LAYOUTS,
    current_name,
)
from megatron_mlra.description.latent import LatentSizes
from megatron_mlra.layers.fp8 import check_fp8
from megatron_mlra.sharding.fit import misfit


def resolve_core_backend(core_backend: str, transformer_impl: str) -> str:
    """`core_backend` itself; for 'auto' that of the layers' implementation: 'torch' or 'te'."""
    core_backend = current_name("core_backend", core_backend)
    if core_backend != "auto":
        return core_backend
    return "te" if transformer_impl == "transformer_engine" else "torch"


def resolve_latent_kernels(latent_kernels: str, transformer_impl: str, rope_dim: int | None) -> str:
    """'torch' or 'mlra_kernels'; 'auto' means mlra_kernels with Transformer Engine layers, but
    torch without RoPE dims (`rope_dim` 0), for which the kernels have no tile."""
    if latent_kernels != "auto":
        return latent_kernels
    kernels = transformer_impl == "transformer_engine" and rope_dim != 0
    return "mlra_kernels" if kernels else "torch"


@dataclass
class MLRAConfig(LatentSizes, MLATransformerConfig):
    """A Megatron transformer whose attention is MLA, GLA-n or MLRA-n.

    MLA is (L, N) = (1, 1), GLA-2 (2, 1), GLA-4 (4, 1), MLRA-2 (4, 2), MLRA-4 (4, 4), MLRA-8 (8, 8).

    Raises:
        ValueError: for every combination that cannot work; the message names the value and one that
        does.
    """

    num_latent_heads: int = 4
    """Latent heads L that kv_lora_rank is cut into; each has its own norm and up-projection."""

    num_branches: int = 4
    """Branches N: latent heads that each attention head attends to; the N outputs are summed."""

    query_head_norm: bool = False
    """RMSNorm of each query head's d_h + d_r numbers, before RoPE and absorption, with one weight
    per head. Megatron's `qk_layernorm` would norm the keys too, which here are latents."""

    output_gate: bool = False
    """Multiply the attention output by sigmoid(x W_G), elementwise, before the output
    projection."""

    variance_scaling: bool = True
    """Scale the query latent by sqrt(d / d_q), each latent head by sqrt(d / d_l) and the branch sum
    by N^-1/2. Off sets all three to 1."""

    zero_init_output: bool = True
    """Start the attention and MLP output projections at zero. Off: init_method, as elsewhere."""

    latent_tp_layout: str = "head"
    """What a tensor-parallel rank owns of the core: 'head' (its heads, over all their latents) or
    'latent' (its latents, over all their heads)."""

    core_form: str = "auto"
    """'absorbed' attends in latent space (L key/value heads), 'materialized' expands keys and
    values for N h heads; 'auto' absorbs where the absorbed core has no more FLOPs: d_l <= d_h."""

    core_backend: str = "auto"
    """'torch', 'te' (Transformer Engine), 'mlra_kernels' (this project's kernels of the absorbed
    form, on Hopper). 'auto': torch with local layers; with Transformer Engine layers, mlra_kernels
    where the kernels fit the model and the GPU, else te."""

    latent_kernels: str = "auto"
    """Norms, absorbed queries and keys, and branch sums by 'torch' or by this project's kernels
    ('mlra_kernels'). 'auto': the kernels with Transformer Engine layers, but torch for NoPE."""

    recompute_absorbed_query: bool = True
    """Rebuild the absorbed queries, N h (d_l + d_r) numbers per token, in backward from the
    unabsorbed ones, h (d_h + d_r) numbers per token, instead of keeping both."""

    fp8_linears: str = "wide"
    """Which linears run in FP8 when `fp8` is set: 'wide' (MLP, output and gate projections) or
    'all', the low-rank projections too."""

    add_bias_linear: bool = False
    """The method has no biases."""

    rope_type: str = "rope"
    """'rope' or 'yarn'; both rotate the half-split pairs (i, i + d_r/2)."""

    def __post_init__(self) -> None:
        self.multi_latent_attention = True
        self.core_backend = current_name("core_backend", self.core_backend)
        self.latent_kernels = current_name("latent_kernels", self.latent_kernels)
        self._validate_variant()
        # Attention sizes its output projection by kv_channels and divides num_query_groups by TP.
        self.kv_channels = self.v_head_dim
        self.num_query_groups = self.num_attention_heads
        if self.init_method is None:
            self.init_method = partial(torch.nn.init.normal_, mean=0.0, std=self.init_method_std)
        self.output_layer_init_method = (
            torch.nn.init.zeros_ if self.zero_init_output else self.init_method
        )
        self._validate_parallel()
        self._validate_features()
        check_fp8(self)
        try:
            super().__post_init__()
        except (AssertionError, NotImplementedError) as error:
            raise ValueError(str(error)) from error
        if self.softmax_scale is None:
            mscale = 1.0
            if self.rope_type == "yarn":
                mscale = _yarn_get_mscale(self.rotary_scaling_factor, self.mscale_all_dim)
            # Explicit: in absorbed form the dot product has d_l + d_r terms, not d_h + d_r.
            self.softmax_scale = mscale * mscale / math.sqrt(self.qk_dim)

    # -- derived sizes -----------------------------------------------------------------------------

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
    def absorbed(self) -> bool:
        """Whether the core runs in latent space (`core_form` resolved)."""
        if self.core_form == "auto":
            return self.latent_dim <= self.qk_nope_head_dim
        return self.core_form == "absorbed"

    # -- validation --------------------------------------------------------------------------------

    def _validate_variant(self) -> None:
        for name in (
            "num_latent_heads",
            "num_branches",
            "num_attention_heads",
            "hidden_size",
            "kv_lora_rank",
            "qk_head_dim",
            "v_head_dim",
            "num_layers",
            "tensor_model_parallel_size",
            "context_parallel_size",
        ):
            value = getattr(self, name)
            if not _is_size(value):
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.q_lora_rank is not None and not _is_size(self.q_lora_rank):
            raise ValueError(
                f"q_lora_rank is {self.q_lora_rank!r}; use at least 1, or leave it out for a query"
                " projected straight from the hidden state"
            )
        L, N, h = self.num_latent_heads, self.num_branches, self.num_attention_heads
        if self.kv_lora_rank % L:
            fits = (n for n in _divisors(self.kv_lora_rank) if n % N == 0 and h % (n // N) == 0)
            better = _nearest(fits, L)
            raise ValueError(
                f"num_latent_heads {L} does not divide kv_lora_rank {self.kv_lora_rank}; use"
                f" {f'num_latent_heads {better} or ' if better else ''}kv_lora_rank"
                f" {_next_multiple(self.kv_lora_rank, L)}"
            )
        if L % N:
            raise ValueError(
                f"num_branches {N} does not divide num_latent_heads {L}; use num_branches"
                f" {_nearest((n for n in _divisors(L) if h % (L // n) == 0), N)}"
            )
        G = L // N
        if h % G:
            raise ValueError(
                f"num_attention_heads {h} does not divide into {G} head groups (num_latent_heads"
                f" {L} / num_branches {N}); use num_attention_heads {_next_multiple(h, G)}"
            )
        if not _is_size(self.qk_pos_emb_head_dim, least=0):
            raise ValueError(
                f"qk_rope_head_dim is {self.qk_pos_emb_head_dim!r}; it must be a whole number, 0"
                " for no RoPE (NoPE)"
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
            ("latent_kernels", LATENT_KERNELS),
            ("fp8_linears", FP8_LINEARS),
            ("rope_type", ("rope", "yarn")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; use one of {', '.join(allowed)}")
        for name, least, fix in (
            ("rotary_base", 1e-9, "a positive one, e.g. 10000"),
            ("layernorm_epsilon", 1e-30, "a positive one, e.g. 1e-6"),
            ("attention_dropout", 0, "a probability from 0 to below 1"),
        ):
            value = getattr(self, name)
            if not _is_at_least(value, least) or (name == "attention_dropout" and value >= 1):
                raise ValueError(f"{name} is {value!r}; use {fix}")
        if self.softmax_scale is not None and not _is_at_least(self.softmax_scale, 1e-30):
            raise ValueError(
                f"softmax_scale is {self.softmax_scale!r}; leave it out for (d_h + d_r)^-1/2"
            )
        if not self.qk_pos_emb_head_dim:
            self._validate_nope()
        if self.no_rope_freq:
            self._validate_no_rope_freq()
        if self.rope_type == "yarn":
            for name in ("rotary_scaling_factor", "original_max_position_embeddings"):
                value = getattr(self, name)
                if not _is_at_least(value, 1):
                    raise ValueError(
                        f"{name} is {value!r}; YaRN extends a context, so use at least 1"
                    )
        if self.rotary_percent != 1.0:
            raise ValueError(
                f"rotary_percent is {self.rotary_percent}; use 1.0 and set qk_rope_head_dim, which"
                " is the RoPE dims themselves"
            )

    def _validate_nope(self) -> None:
        """Refuse options of RoPE dims for a model without RoPE dims."""
        if self.rope_type == "yarn":
            raise ValueError(
                "rope_type yarn stretches RoPE, and qk_rope_head_dim is 0 (NoPE); use rope_type"
                " rope"
            )
        if self.latent_kernels == "mlra_kernels":
            raise ValueError(
                "latent_kernels mlra_kernels rotate at least 16 dims, and qk_rope_head_dim is 0"
                " (NoPE); use latent_kernels torch or auto"
            )

    def _validate_no_rope_freq(self) -> None:
        """Refuse options that do not go with layers without rotation."""
        freq = self.no_rope_freq
        for name, value, wrong, fix in (
            ("rope_type", "yarn", self.rope_type == "yarn", "use rope_type rope"),
            ("mtp_num_layers", self.mtp_num_layers, self.mtp_num_layers, "leave it out"),
            ("qk_rope_head_dim", 0, not self.qk_pos_emb_head_dim, "leave no_rope_freq out"),
        ):
            if wrong:
                raise ValueError(f"{name} {value} does not go with no_rope_freq ({freq}): {fix}")
        n = self.num_layers
        if isinstance(freq, int):
            if n % freq:
                better = _nearest(_divisors(n), freq)
                raise ValueError(
                    f"no_rope_freq {freq} does not divide num_layers {n}; use no_rope_freq {better}"
                )
        elif len(freq) != n or set(freq) - {0, 1}:
            raise ValueError(
                f"no_rope_freq is {freq}; use a 0 or 1 for each of num_layers {n}, 1 for no RoPE"
            )

    def rotates(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, rotates its RoPE dims."""
        return not (self.no_rope_freq and self.no_rope_freq[layer])

    def _validate_parallel(self) -> None:
        tp, layout = self.tensor_model_parallel_size, self.latent_tp_layout
        if found := misfit(tp, layout, self):
            fits = (n for n in range(1, 2 * tp) if not misfit(n, layout, self))
            raise ValueError(
                f"tensor parallel size {tp} {found[0]}; use tensor parallel size"
                f" {_nearest(fits, tp)}{found[1]}"
            )

    def _validate_features(self) -> None:
        for name, fix in _REFUSED.items():
            value = getattr(self, name)
            if value:
                raise ValueError(f"{name} ({value!r}) does not work with MLRA: {fix}")
        for name, needed in (("softmax_type", "vanilla"), ("normalization", "RMSNorm")):
            value = getattr(self, name)
            if value != needed:
                raise ValueError(f"{name} ({value!r}) does not work with MLRA: use {needed}")
        if self.fine_grained_activation_offloading:
            self._validate_offloading()

    def _validate_offloading(self) -> None:
        offloaded, granularity = set(self.offload_modules or ()), self.recompute_granularity
        if granularity == "full":
            raise ValueError(
                "recompute_granularity full leaves nothing to fine_grained_activation_offloading;"
                " use recompute_granularity selective"
            )
        modules = ["core_attn"] if self.recompute_modules is None else self.recompute_modules
        rebuilt = {"core_attn", "mla_up_proj"} & set(modules if granularity else ())
        if "core_attn" in offloaded and rebuilt:
            raise ValueError(
                f"recompute_modules {' '.join(sorted(rebuilt))} rebuilds what offload_modules"
                " core_attn copies to the host; leave it out of one of them"
            )
        graphs, ours = self.cuda_graph_impl, offloaded & {"qkv_linear", "core_attn", "attn_proj"}
        if ours and graphs != "none":
            raise ValueError(
                f"cuda_graph_impl {graphs} does not work with offload_modules"
                f" {' '.join(sorted(ours))} of MLRA; use cuda_graph_impl none"
            )


_REFUSED = {
    "add_bias_linear": "it has no biases; use --disable-bias-linear",
    "add_qkv_bias": "it has no biases; leave it out",
    "qk_layernorm": "it always normalises the latents of queries and keys, and a norm of keys"
    " behind their up-projection would take them out of latent space; leave it out, or use"
    " query_head_norm or qk_clip",
    "attention_output_gate": "use output_gate",
    "apply_rope_fusion": "use --no-rope-fusion",
    "rotary_interleaved": "its RoPE is half-split; leave it out",
    "cache_mla_latents": "it is for Megatron's own MLA; leave it out",
    "mla_down_proj_fusion": "it is for Megatron's own MLA; leave it out",
    "experimental_attention_variant": "it replaces the attention; leave it out",
    "flash_decode": "it caches expanded heads; leave it out",
    "window_size": "it attends to the whole past; leave it out",
    "apply_query_key_layer_scaling": "leave it out",
}
"""Features of Megatron's own attentions: refused where they would be ignored."""


def _next_multiple(value: int, factor: int) -> int:
    return -(-value // factor) * factor


def _divisors(value: int) -> list[int]:
    return [n for n in range(1, value + 1) if value % n == 0]


def _nearest(values: Iterable[int], wanted: int) -> int | None:
    """The one of `values` nearest to `wanted` (the larger of two equally near)."""
    return min(values, key=lambda n: (abs(n - wanted), -n), default=None)


def _is_size(value, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_at_least(value, least: float) -> bool:
    return isinstance(value, int | float) and value >= least and math.isfinite(value)
