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
from typing import Any

ATTENTIONS = ("mlra", "gqa", "gta", "mfa", "tpa")


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
