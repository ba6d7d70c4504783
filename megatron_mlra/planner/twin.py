"""A preset's twin: a model with another attention and the same number of parameters.

Sizes follow the paper's ratios. Letters: d hidden size, h heads, d_h size of a head. Latent family:
d_c = 4 d_h, d_r = d_h / 2, query rank d / 2 for MLA and d / 3 for the others. GQA and GTA have
h / 4 key/value heads. MFA has heads of 2 d_h from a shared query of 2 d / 3. TPA has ranks 6 and 2.
A source of the latent family keeps its own sizes; the query ranks of MLA and the others are as
3 : 2. The MLP's size makes the number of parameters equal.

A norm of query heads stays within the latent family, and is Megatron's `qk_layernorm` in a twin
with grouped queries; GTA, MFA and TPA have none. In the other direction a latent twin gets none,
because its queries and keys are made of normalised latents.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_mlra.cost.parameters import parameters
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.presets import (
    ALIASES,
    FOLDER,
    find_preset,
    preset_chain,
    preset_values,
)
from megatron_mlra.planner.cli import shape_of

LATENT = {"mla": (1, 1), "gla2": (2, 1), "gla4": (4, 1), "mlra2": (4, 2), "mlra4": (4, 4)}
"""Name -> latent heads L and branches N."""
OTHERS = ("mha", "gqa", "mqa", "gta", "mfa", "tpa")
VARIANTS = (
    *LATENT,
    *(f"{name}-gated" for name in LATENT),
    *(f"{name}-unscaled" for name in LATENT),
    *OTHERS,
    "gqa-gated",
)
"""Values of `--attention`; '-gated' adds the output gate, '-unscaled' omits variance scaling."""

TOLERANCE = 1e-3
"""Largest relative difference of the parameter counts."""

_KEYS = """
    attention num_latent_heads num_branches q_lora_rank kv_lora_rank qk_head_dim
    qk_pos_emb_head_dim v_head_dim output_gate attention_output_gate variance_scaling
    no_variance_scaling kv_channels group_query_attention num_query_groups tpa_q_rank
    tpa_kv_rank core_form core_backend latent_kernels latent_tp_layout qk_layernorm query_head_norm
"""
ATTENTION_KEYS = frozenset(_KEYS.split())
"""Keys of a preset that describe its attention, by argparse destination or flag."""


@dataclass(frozen=True)
class Twin:
    """A preset and its twin."""

    variant: str
    base: Path | None
    """The common base of both presets, without keys of the attention."""
    values: dict[str, Any]
    """The twin's own values, which are added to `base`."""
    source: ModelDescription
    shape: ModelDescription

    @property
    def title(self) -> str:
        """The common name of the twin's attention."""
        return self.shape.variant + " unscaled" * self.variant.endswith("-unscaled")

    @property
    def difference(self) -> float:
        """Parameters of the twin / those of the source - 1."""
        return parameters(self.shape).total / parameters(self.source).total - 1

    def to_yaml(self, folder: Path, source: str) -> str:
        """The text of the twin as a preset.

        Args:
            folder: of the preset; the path of the base is relative to it.
            source: name of the source.
        """
        head = (
            f"# {self.title}: the twin of {source}, {parameters(self.shape).total:,}"
            f" parameters ({100 * self.difference:+.4f} %).\n"
        )
        values = dict(self.values)
        if self.base is not None:
            values = {"base": base_from(self.base, folder), **values}
        return head + yaml.safe_dump(values, sort_keys=False)


def base_from(base: Path, folder: Path) -> str:
    """The value of `base` in a preset in `folder`: the name of one of the package, else a path."""
    if FOLDER in base.resolve().parents:
        return base.resolve().relative_to(FOLDER).as_posix().removesuffix(".yaml")
    return Path(os.path.relpath(base.resolve(), folder.resolve())).as_posix()


def twin(preset: str | Path, variant: str) -> Twin:
    """The twin of a preset with another attention, equal in parameters to 0.1 %.

    The MLP's hidden size per tensor-parallel rank is a multiple of 8 if one is within the
    tolerance, else of 4, 2 or 1. In a mixture of experts the size of the shared experts is adapted,
    or that of the routed experts if there are no shared ones.

    Raises:
        ValueError: the variant is unknown, the preset cannot be read or lacks a size, or no MLP
            size meets the tolerance.
    """
    if variant not in VARIANTS:
        raise ValueError(f"--attention is {variant!r}; use one of {', '.join(VARIANTS)}")
    merged = preset_values(preset)
    source = shape_of(merged)
    base, kept = _plain_part(preset)
    attention = _attention(source, merged, variant)
    common = {key: value for key, value in merged.items() if key not in ATTENTION_KEYS}
    key = "ffn_hidden_size"
    if source.num_experts:
        shared = source.moe_shared_expert_intermediate_size
        key = "moe_shared_expert_intermediate_size" if shared else "moe_ffn_hidden_size"

    def sized(size: int) -> ModelDescription:
        return shape_of(common | attention | {key: size})

    # The count is linear in the size: one MLP unit costs the difference of two counts.
    start = 8
    lowest = parameters(sized(start)).total
    unit = parameters(sized(start + 1)).total - lowest
    target = parameters(source).total
    exact = start + (target - lowest) / unit
    ranks = merged.get("tensor_model_parallel_size") or 1
    for multiple in (8 * ranks, 4 * ranks, 2 * ranks, ranks):
        size = round(exact / multiple) * multiple
        if size > 0 and abs(parameters(sized(size)).total / target - 1) <= TOLERANCE:
            values = {k: v for k, v in kept.items() if k not in ATTENTION_KEYS} | attention
            return Twin(variant, base, values | {key: size}, source, sized(size))
    raise ValueError(
        f"--attention {variant}: no {key} makes it equal to {preset} within"
        f" {100 * TOLERANCE} % ({exact:.1f} would be exact); use a larger preset"
    )


def _plain_part(preset: str | Path) -> tuple[Path | None, dict[str, Any]]:
    """(The last preset of the chain before any with keys of the attention, the merged values of the
    later ones by argparse destination)."""
    preset = find_preset(preset)
    base: Path | None = None
    above: dict[str, Any] = {}
    for file, values in preset_chain(preset):
        values = {ALIASES.get(key, key): value for key, value in values.items()}
        if not above and not ATTENTION_KEYS & set(values) and file != preset:
            base = file
        else:
            above |= values
    return base, above


def _attention(source: ModelDescription, merged: dict[str, Any], variant: str) -> dict[str, Any]:
    """The keys of the twin's attention."""
    name, _, suffix = variant.partition("-")
    d, h = source.hidden_size, source.num_attention_heads
    latent = source.attention == "mlra"
    d_h = source.qk_nope_head_dim if latent else source.head_dim
    if source.attention == "mfa":
        d_h //= 2
    if name in LATENT:
        L, N = LATENT[name]
        values: dict[str, Any] = {"attention": "mlra", "num_latent_heads": L, "num_branches": N}
        rank = _query_rank(source, name) if latent else _multiple(d / (2 if name == "mla" else 3))
        if rank is not None:
            values["q_lora_rank"] = rank
        values |= {
            "kv_lora_rank": source.kv_lora_rank if latent else 4 * d_h,
            "qk_head_dim": d_h,
            "qk_pos_emb_head_dim": source.qk_rope_head_dim if latent else d_h // 2,
            "v_head_dim": source.v_head_dim if latent else d_h,
        }
        if source.query_head_norm:
            values["query_head_norm"] = True
        if suffix == "gated":
            values["output_gate"] = True
        if suffix == "unscaled":
            values["variance_scaling"] = False
        return values
    groups = max(1, h // 4)
    values = {
        "mha": {"attention": "gqa", "kv_channels": d_h},
        "mqa": {"attention": "gqa", **_grouped(1), "kv_channels": d_h},
        "gqa": {"attention": "gqa", **_grouped(groups), "kv_channels": d_h},
        "gta": {
            "attention": "gta",
            **_grouped(groups),
            "kv_channels": d_h,
            "qk_pos_emb_head_dim": d_h // 2,
        },
        "mfa": {"attention": "mfa", "kv_channels": 2 * d_h, "q_lora_rank": _multiple(2 * d / 3)},
        "tpa": {"attention": "tpa", "kv_channels": d_h, "tpa_q_rank": 6, "tpa_kv_rank": 2},
    }[name]
    if values["attention"] == "gqa" and (merged.get("qk_layernorm") or source.query_head_norm):
        values["qk_layernorm"] = True
    return values | ({"attention_output_gate": True} if suffix else {})


def _grouped(groups: int) -> dict[str, Any]:
    return {"group_query_attention": True, "num_query_groups": groups}


def _query_rank(source: ModelDescription, name: str) -> int | None:
    """The query rank of a latent twin of a latent source: 3 : 2 between MLA and the others."""
    if source.q_lora_rank is None:
        return None
    was_mla, is_mla = source.num_latent_heads == 1, name == "mla"
    if was_mla == is_mla:
        return source.q_lora_rank
    return _multiple(source.q_lora_rank * (3 / 2 if is_mla else 2 / 3))


def _multiple(size: float) -> int:
    return max(16, round(size / 16) * 16)
