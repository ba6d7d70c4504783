"""What a model costs, from its dimensions alone: parameters, KV cache, FLOPs, communication.

Pure Python: importing it loads neither torch nor Megatron, so a planner can price a run anywhere.

Letters: V vocabulary (padded), d hidden size, f MLP size, h attention heads, n layers, s sequence
length, g key/value heads of GQA and GTA, c head dim of GQA, GTA, MFA and TPA (`kv_channels`); of
the latent family L latent heads, N branches, G = L / N head groups, d_q, d_c, d_l = d_c / L, d_h,
d_r, d_v as in config.py. Linear layers have no biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

ATTENTIONS = ("mlra", "gqa", "gta", "mfa", "tpa")
RECOMPUTES = (None, "core", "up_proj", "full")


@dataclass(frozen=True)
class ModelShape:
    """The dimensions that decide a decoder's cost. Sizes an attention kind does not have stay 0."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int
    """Padded: the rows of the embedding."""
    seq_length: int = 0
    tied_embeddings: bool = True
    swiglu: bool = True

    attention: str = "mlra"
    """'mlra' (MLA, GLA and MLRA), 'gqa' (MHA, MQA and GQA), 'gta', 'mfa' or 'tpa'."""
    output_gate: bool = False
    """sigmoid(x W_G) on the attention output ('mlra' and 'gqa')."""

    num_latent_heads: int = 0
    num_branches: int = 0
    q_lora_rank: int | None = None
    """d_q of 'mlra' (None: query straight from x), and the shared query size of 'mfa'."""
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    """d_r of 'mlra' and 'gta'."""
    v_head_dim: int = 0
    absorbed: bool = False
    """Whether the core of 'mlra' attends in latent space."""

    num_query_groups: int = 0
    kv_channels: int = 0
    qk_layernorm: bool = False
    """An RMSNorm on each query and key head of 'gqa'."""
    tpa_q_rank: int = 0
    tpa_kv_rank: int = 0

    num_experts: int = 0
    """Routed experts of a MoE layer; 0 for a dense model."""
    moe_topk: int = 0
    moe_ffn_hidden_size: int = 0
    moe_shared_ffn_hidden_size: int = 0
    num_dense_layers: int = 0
    """Layers of a MoE model whose MLP is dense."""

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention is {self.attention!r}; use one of {', '.join(ATTENTIONS)}")
        needed = "num_layers hidden_size ffn_hidden_size num_attention_heads vocab_size "
        needed += {
            "mlra": "num_latent_heads num_branches kv_lora_rank qk_nope_head_dim qk_rope_head_dim"
            " v_head_dim",
            "gqa": "num_query_groups kv_channels",
            "gta": "num_query_groups kv_channels qk_rope_head_dim",
            "mfa": "q_lora_rank kv_channels",
            "tpa": "kv_channels tpa_q_rank tpa_kv_rank",
        }[self.attention]
        for name in needed.split():
            value = getattr(self, name)
            if not value:
                raise ValueError(f"{name} is {value!r}; {self.attention!r} needs at least 1")

    @property
    def latent_dim(self) -> int:
        """d_l = d_c / L."""
        return self.kv_lora_rank // self.num_latent_heads

    @property
    def variant(self) -> str:
        """The name people use: 'MLRA-4', 'GLA-2', 'MHA', 'GQA', ..., with ' gated' when gated."""
        if self.attention == "mlra":
            if self.num_branches > 1:
                name = f"MLRA-{self.num_branches}"
            else:
                name = f"GLA-{self.num_latent_heads}" if self.num_latent_heads > 1 else "MLA"
        elif self.attention == "gqa":
            name = {1: "MQA", self.num_attention_heads: "MHA"}.get(self.num_query_groups, "GQA")
        else:
            name = self.attention.upper()
        return name + (" gated" if self.output_gate else "")

    @classmethod
    def from_args(cls, args: Any, **overrides: Any) -> ModelShape:
        """The shape of parsed arguments, a preset (a mapping) or a configuration object.

        Megatron's names are read (`qk_head_dim`, `padded_vocab_size`, `num_experts`, ...);
        `overrides` are fields of this class and win. Without `padded_vocab_size`, `vocab_size` is
        padded as Megatron pads it.
        """

        def get(*names: str, default: Any = None) -> Any:
            for name in names:
                value = args.get(name) if isinstance(args, Mapping) else getattr(args, name, None)
                if value is not None:
                    return value
            return default

        kind = get("attention", default="mlra" if get("num_latent_heads") else "gqa")
        kind = overrides.get("attention", kind)
        d, h = get("hidden_size", default=0), get("num_attention_heads", default=0)
        swiglu = bool(get("swiglu", "gated_linear_unit", default=False))
        ffn = get("ffn_hidden_size", default=(d * 8 // 3) // 64 * 64 if swiglu else 4 * d)
        vocab, multiple = get("padded_vocab_size"), get("make_vocab_size_divisible_by", default=128)
        if vocab is None:
            multiple *= get("tensor_model_parallel_size", default=1)
            vocab = -(-get("vocab_size", default=0) // multiple) * multiple
        untied = get("untie_embeddings_and_output_weights")
        tied = not untied
        if untied is None:
            tied = get("share_embeddings_and_output_weights", default=True)
        values: dict[str, Any] = {
            "num_layers": get("num_layers", default=0),
            "hidden_size": d,
            "ffn_hidden_size": ffn,
            "num_attention_heads": h,
            "vocab_size": vocab,
            "seq_length": get("seq_length", default=0),
            "tied_embeddings": tied,
            "swiglu": swiglu,
            "attention": kind,
        }
        if kind == "mlra":
            L, d_h = get("num_latent_heads", default=4), get("qk_head_dim", default=128)
            values |= {
                "num_latent_heads": L,
                "num_branches": get("num_branches", default=4),
                "q_lora_rank": get("q_lora_rank"),
                "kv_lora_rank": get("kv_lora_rank", default=0),
                "qk_nope_head_dim": d_h,
                "qk_rope_head_dim": get("qk_pos_emb_head_dim", default=64),
                "v_head_dim": get("v_head_dim", default=128),
                "output_gate": bool(get("output_gate", default=False)),
            }
            form = get("core_form", default="auto")
            values["absorbed"] = (
                values["kv_lora_rank"] // L <= d_h if form == "auto" else form == "absorbed"
            )
        else:
            grouped = get("group_query_attention", default=True)
            values |= {
                "num_query_groups": get("num_query_groups", default=h) if grouped else h,
                "kv_channels": get("kv_channels", default=d // h if h else 0),
            }
            if kind == "gqa":
                values["output_gate"] = bool(get("attention_output_gate", default=False))
                values["qk_layernorm"] = bool(get("qk_layernorm", default=False))
            elif kind == "gta":
                values["qk_rope_head_dim"] = get("qk_pos_emb_head_dim", default=0)
            elif kind == "mfa":
                values["q_lora_rank"] = get("q_lora_rank")
            else:
                values["tpa_q_rank"] = get("tpa_q_rank", default=0)
                values["tpa_kv_rank"] = get("tpa_kv_rank", default=0)
        if experts := get("num_experts", "num_moe_experts"):
            freq = get("moe_layer_freq", default=1)
            values |= {
                "num_experts": experts,
                "moe_topk": get("moe_router_topk", default=2),
                "moe_ffn_hidden_size": get("moe_ffn_hidden_size", default=ffn),
                "moe_shared_ffn_hidden_size": get("moe_shared_expert_intermediate_size", default=0),
                "num_dense_layers": _dense_layers(freq, values["num_layers"]),
            }
        unknown = set(overrides) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{sorted(unknown)} are not fields of ModelShape")
        return cls(**(values | overrides))


def _dense_layers(moe_layer_freq: Any, num_layers: int) -> int:
    """Dense layers of a moe_layer_freq: layer i is MoE where i % freq == 0, or list[i] is 1."""
    if isinstance(moe_layer_freq, int):
        return num_layers - len(range(0, num_layers, moe_layer_freq))
    if not isinstance(moe_layer_freq, list | tuple) or len(moe_layer_freq) != num_layers:
        raise ValueError(
            f"moe_layer_freq is {moe_layer_freq!r}; use an integer or {num_layers} zeros and ones"
        )
    return num_layers - sum(moe_layer_freq)


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. `attention` and `attention_norms` are of one layer, by weight name."""

    embedding: int
    """V d."""
    output_layer: int
    """V d, or 0 when tied to the embedding."""
    attention: dict[str, int]
    """Matrices of the attention of one layer."""
    attention_norms: dict[str, int]
    """Norm weights inside the attention of one layer."""
    layer_norms: int
    """2 d: the norms before attention and MLP of one layer."""
    mlp: int
    """3 d f (SwiGLU; else 2 d f): the MLP of one dense layer."""
    moe: int
    """d E + E 3 d f_e + 3 d f_shared: router, experts and shared expert of one MoE layer."""
    moe_active: int
    """The same with the k experts that a token visits in place of all E."""
    final_norm: int
    """d."""
    total: int
    active: int
    """What one token uses; `total` for a dense model."""


def parameters(shape: ModelShape) -> Parameters:
    """Count every parameter of the model.

    total = V d (twice if untied) + d + n (attention + attention norms + 2 d) + dense layers * mlp
    + MoE layers * moe.
    """
    d, f, n = shape.hidden_size, shape.ffn_hidden_size, shape.num_layers
    matrices = 3 if shape.swiglu else 2
    weights, norms = _attention_weights(shape), _attention_norms(shape)
    embedding, mlp = shape.vocab_size * d, matrices * d * f
    output = 0 if shape.tied_embeddings else embedding
    shared = d * shape.num_experts + matrices * d * shape.moe_shared_ffn_hidden_size
    expert = matrices * d * shape.moe_ffn_hidden_size
    moe, active = shared + shape.num_experts * expert, shared + shape.moe_topk * expert
    moe_layers = n - shape.num_dense_layers if shape.num_experts else 0
    rest = (
        embedding
        + output
        + d
        + n * (sum(weights.values()) + sum(norms.values()) + 2 * d)
        + (n - moe_layers) * mlp
    )
    return Parameters(
        embedding=embedding,
        output_layer=output,
        attention=weights,
        attention_norms=norms,
        layer_norms=2 * d,
        mlp=mlp,
        moe=moe,
        moe_active=active,
        final_norm=d,
        total=rest + moe_layers * moe,
        active=rest + moe_layers * active,
    )


def _attention_weights(shape: ModelShape) -> dict[str, int]:
    d, h, c, g = (
        shape.hidden_size,
        shape.num_attention_heads,
        shape.kv_channels,
        shape.num_query_groups,
    )
    if shape.attention == "mlra":
        d_q, d_c, d_r = shape.q_lora_rank, shape.kv_lora_rank, shape.qk_rope_head_dim
        d_h, d_v = shape.qk_nope_head_dim, shape.v_head_dim
        q_out = h * (d_h + d_r)
        weights = {"linear_q_proj": d * q_out}
        if d_q is not None:
            weights = {"linear_q_down_proj": d * d_q, "linear_q_up_proj": d_q * q_out}
        weights["linear_kv_down_proj"] = d * (d_c + d_r)
        # L blocks of [d_l, (h / G) (d_h + d_v)] are N h heads of [d_l, d_h + d_v].
        weights["linear_kv_up_proj"] = shape.latent_dim * shape.num_branches * h * (d_h + d_v)
        if shape.output_gate:
            weights["linear_gate_proj"] = d * h * d_v
        return weights | {"linear_proj": h * d_v * d}
    if shape.attention == "gqa":
        gate = h if shape.output_gate else 0
        weights = {"linear_qkv": d * c * (h + gate + 2 * g)}
    elif shape.attention == "gta":
        weights = {
            "linear_q_proj": d * h * c,
            "linear_kv_proj": d * g * c,
            "linear_k_rope_proj": d * shape.qk_rope_head_dim,
        }
    elif shape.attention == "mfa":
        weights = {
            "linear_q_down_proj": d * shape.q_lora_rank,
            "linear_q_up_proj": shape.q_lora_rank * h * c,
            "linear_kv_proj": d * 2 * c,
        }
    else:
        ranks = {"q": shape.tpa_q_rank, "k": shape.tpa_kv_rank, "v": shape.tpa_kv_rank}
        weights = {f"linear_{x}_head_factors": d * h * r for x, r in ranks.items()}
        weights |= {f"linear_{x}_dim_factors": d * r * c for x, r in ranks.items()}
    return weights | {"linear_proj": h * c * d}


def _attention_norms(shape: ModelShape) -> dict[str, int]:
    norms = {}
    if shape.attention in ("mlra", "mfa") and shape.q_lora_rank is not None:
        norms["q_norm"] = shape.q_lora_rank
    if shape.attention == "mlra":
        norms["kv_norm"] = shape.kv_lora_rank  # L weights of d_l
    if shape.attention == "gqa" and shape.qk_layernorm:
        norms["qk_layernorm"] = 2 * shape.kv_channels
    return norms


def kv_cache_elements(shape: ModelShape, tp: int = 1, layout: str = "latent") -> int:
    """Cached numbers per token and layer on one of `tp` tensor-parallel ranks (tp = 1: all).

    Latent layout max(L / tp, 1) d_l + d_r; head layout d_c + d_r on every rank; GQA max(g / tp, 1)
    2 c; GTA max(g / tp, 1) c + d_r; MFA 2 c (one key and one value head, replicated); TPA, which
    caches the key and value factors, 2 R_kv (max(h / tp, 1) + c).
    """
    if layout not in ("latent", "head"):
        raise ValueError(f"layout is {layout!r}; use latent or head")
    c, d_r = shape.kv_channels, shape.qk_rope_head_dim

    def share(count: int) -> int:
        return -(-count // tp)

    if shape.attention == "mlra":
        latents = share(shape.num_latent_heads) if layout == "latent" else shape.num_latent_heads
        return latents * shape.latent_dim + d_r
    if shape.attention == "gqa":
        return share(shape.num_query_groups) * 2 * c
    if shape.attention == "gta":
        return share(shape.num_query_groups) * c + d_r
    if shape.attention == "mfa":
        return 2 * c
    return 2 * shape.tpa_kv_rank * (share(shape.num_attention_heads) + c)


def kv_cache_bytes_per_token(
    shape: ModelShape, tp: int = 1, dtype_bytes: int = 2, layout: str = "latent"
) -> int:
    """Bytes a cached token takes on one rank, all layers: n * elements * dtype_bytes."""
    return shape.num_layers * kv_cache_elements(shape, tp, layout) * dtype_bytes


class TrainFlops(NamedTuple):
    """Floating-point operations (a multiply-add is two) of one training step, per token."""

    model: float
    """What the method needs."""
    hardware: float
    """What the chosen form runs."""


def train_flops_per_token(
    shape: ModelShape,
    seq_length: int | None = None,
    recompute: str | None = None,
    fused_core: bool = False,
) -> TrainFlops:
    """Training FLOPs per token: forward plus a backward of twice the forward.

    Counted: every matrix product. A weight matrix of P parameters costs 2 P forward, the output
    layer 2 V d; TPA adds 2 h c (R_q + 2 R_kv) for assembling heads from factors. The core costs
    2 N h (score terms + value terms) k, with the **causal half** k = (s + 1) / 2, the mean number
    of keys that a query sees. Terms of a score and of a value product:

    - model FLOPs: d_h + d_r and d_v for the latent family, in all N branches, whatever form is run;
    - hardware FLOPs: d_l + d_r and d_l where absorbed. Up-projecting latents, or absorbing W_UK and
      applying W_UV, cost the same 2 N h d_l (d_h + d_v), so the term of the weights does not
      change.

    `recompute` adds its extra forward to the hardware FLOPs: 'core' the score and value products,
    'up_proj' what lies between the compressed latents and the core (the query's up-projection; W_UK
    absorbed, W_UK and W_UV materialized), 'full' all layers. `fused_core` adds the score product
    that flash-style kernels repeat in their backward; it is off by default, as is usual where
    hardware FLOPs are compared.
    """
    if recompute not in RECOMPUTES:
        raise ValueError(f"recompute is {recompute!r}; use None, 'core', 'up_proj' or 'full'")
    s = shape.seq_length if seq_length is None else seq_length
    if s < 1:
        raise ValueError(f"seq_length is {s}; use at least 1")
    n, h, c, p = shape.num_layers, shape.num_attention_heads, shape.kv_channels, parameters(shape)
    keys = (s + 1) / 2
    mlp = p.mlp * n
    if shape.num_experts:
        mlp = p.mlp * shape.num_dense_layers + p.moe_active * (n - shape.num_dense_layers)
    layers = 2.0 * (n * sum(p.attention.values()) + mlp)
    if shape.attention == "tpa":
        layers += n * 2 * h * c * (shape.tpa_q_rank + 2 * shape.tpa_kv_rank)
    output = 2.0 * p.embedding
    heads, score, value, run_score, run_value = h, c, c, c, c
    up_proj = 0.0
    if shape.attention == "mlra":
        d_h, d_r, d_l, d_v = (
            shape.qk_nope_head_dim,
            shape.qk_rope_head_dim,
            shape.latent_dim,
            shape.v_head_dim,
        )
        heads, score, value = shape.num_branches * h, d_h + d_r, d_v
        run_score, run_value = (d_l + d_r, d_l) if shape.absorbed else (score, value)
        before_core = d_h if shape.absorbed else d_h + d_v
        query = "linear_q_proj" if shape.q_lora_rank is None else "linear_q_up_proj"
        up_proj = 2.0 * n * (p.attention[query] + heads * d_l * before_core)
    elif recompute == "up_proj":
        raise ValueError(f"recompute is 'up_proj', but {shape.variant} has no latents; use 'core'")
    core = 2.0 * n * heads * (score + value) * keys
    run_core = 2.0 * n * heads * (run_score + run_value) * keys
    extra = {None: 0.0, "core": run_core, "up_proj": up_proj, "full": layers + run_core}[recompute]
    if fused_core:
        extra += 2.0 * n * heads * run_score * keys
    linear = 3.0 * (layers + output)
    return TrainFlops(model=linear + 3 * core, hardware=linear + 3 * run_core + extra)
