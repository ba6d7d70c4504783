"""Parallel layouts of a training run, and whether a model's sizes divide by one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.sharding.fit import misfit

RECOMPUTES = ("none", "core", "up_proj", "core+up_proj", "full")
"""The planner's names of recomputation in backward; `Layout.flags` gives Megatron's."""


@dataclass(frozen=True)
class Layout:
    """One way to cut a training run over GPUs; sizes of Megatron's parallel groups."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Model chunks per pipeline stage (1: not interleaved)."""
    cp: int = 1
    ep: int = 1
    dp: int = 1
    micro_batch: int = 1
    recompute: str = "none"
    sequence_parallel: bool = True
    """No effect at tp 1."""
    tp_layout: str = "head"
    distributed_optimizer: bool = True
    keep_absorbed_query: bool = False
    """Whether the absorbed core's query is saved for backward instead of rebuilt."""

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def sequence_share(self) -> float:
        """Share of a context-parallel rank's tokens that each tensor-parallel rank has outside the
        tensor-parallel regions."""
        return 1 / self.tp if self.sequence_parallel else 1.0

    def __str__(self) -> str:
        parts = [f"TP{self.tp}", f"PP{self.pp}", f"DP{self.dp}"]
        if self.vpp > 1:
            parts[1] += f" (x{self.vpp})"
        if self.cp > 1:
            parts.insert(1, f"CP{self.cp}")
        if self.ep > 1:
            parts.append(f"EP{self.ep}")
        return " ".join(parts)

    def flags(self, shape: ModelDescription) -> dict[str, Any]:
        """The layout as keys of a preset."""
        values: dict[str, Any] = {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "micro_batch_size": self.micro_batch,
        }
        if self.tp > 1:
            values["sequence_parallel"] = self.sequence_parallel
        if self.vpp > 1:
            per_chunk = shape.num_layers // (self.pp * self.vpp)
            values["num_layers_per_virtual_pipeline_stage"] = per_chunk
        if self.cp > 1:
            values["context_parallel_size"] = self.cp
        if self.ep > 1:
            values["expert_model_parallel_size"] = self.ep
        if self.recompute == "full":
            values |= {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            }
        elif self.recompute != "none":
            modules = {"core": "core_attn", "up_proj": "mla_up_proj"}
            values["recompute_granularity"] = "selective"
            values["recompute_modules"] = [modules[part] for part in self.recompute.split("+")]
        return values

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def why_not(shape: ModelDescription, layout: Layout, global_batch: int, domain: int) -> str | None:
    """The first reason why a model and batch do not fit a layout, in one line; None if they fit.

    Args:
        global_batch: sequences per step.
        domain: GPUs per NVLink domain.
    """
    tp, n = layout.tp, shape.num_layers
    if tp > domain:
        return f"TP{tp} leaves the NVLink domain of {domain}"
    reason = attention_misfit(shape, tp, layout.tp_layout)
    if reason:
        return f"TP{tp} {reason}"
    for name, size in (
        ("ffn_hidden_size", shape.ffn_hidden_size),
        ("vocab_size", shape.embedding_rows),
        ("moe_ffn_hidden_size", shape.moe_ffn_hidden_size),
    ):
        if size % tp:
            return f"TP{tp} does not divide {name} {size}"
    if n % (layout.pp * layout.vpp):
        chunks = layout.pp * layout.vpp
        return f"PP{layout.pp} x {layout.vpp} does not divide {n} layers into {chunks} chunks"
    if layout.ep > 1 and (not shape.num_experts or shape.num_experts % layout.ep):
        return f"EP{layout.ep} does not divide {shape.num_experts} experts"
    if (layout.dp * layout.cp * layout.tp) % (layout.ep * layout.tp):
        return f"EP{layout.ep} does not divide DP{layout.dp} x CP{layout.cp}"
    if layout.cp > 1 and shape.attention not in ("mlra", "gqa"):
        return f"CP{layout.cp} does not work with attention {shape.attention}"
    if shape.seq_length % (tp * layout.cp * (2 if layout.cp > 1 else 1)):
        return f"TP{tp} x CP{layout.cp} does not divide {shape.seq_length} tokens"
    per_step = layout.dp * layout.micro_batch
    if global_batch % per_step:
        return f"DP{layout.dp} x micro-batch {layout.micro_batch} does not divide {global_batch}"
    if layout.vpp > 1 and (global_batch // per_step) % layout.pp:
        return f"{global_batch // per_step} micro-batches are no multiple of PP{layout.pp}"
    return None


def attention_misfit(shape: ModelDescription, tp: int, tp_layout: str) -> str | None:
    """The reason why the attention does not fit a tensor-parallel size, or None."""
    if shape.attention == "mlra":
        found = misfit(tp, tp_layout, shape)
        return found[0] if found else None
    sizes = {"num_attention_heads": shape.num_attention_heads}
    groups = shape.num_query_groups
    if shape.attention == "gta":
        sizes |= {"num_query_groups": groups, "qk_pos_emb_head_dim": shape.qk_rope_head_dim}
    elif shape.attention == "mfa":
        sizes |= {"q_lora_rank": shape.q_lora_rank or 0, "2 * kv_channels": 2 * shape.head_dim}
    elif shape.attention == "tpa":
        sizes["tpa_kv_rank * kv_channels"] = shape.tpa_kv_rank * shape.head_dim
    for name, size in sizes.items():
        if size % tp:
            return f"does not divide {name} {size}"
    if shape.attention == "gqa" and groups % tp and tp % groups:
        return f"does not fit {groups} query groups"
    return None
