"""cos and sin of the RoPE angles, computed once for all layers of a model."""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from torch import Tensor

from megatron_mlra.layers.config import MLRAConfig

_FIELDS = (
    "rope_type",
    "qk_pos_emb_head_dim",
    "rotary_base",
    "use_cpu_initialization",
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)


class RotaryTables:
    """Megatron's rotary embedding of the RoPE dims; keeps the last tables it returned.

    Args:
        config: supplies the RoPE type and its constants.
    """

    def __init__(self, config: MLRAConfig) -> None:
        common = {"rotary_base": config.rotary_base}
        if config.use_cpu_initialization:
            common["use_cpu_initialization"] = True
        # A model without RoPE (NoPE) has empty tables: tables of 2 dims, cut to 0 columns.
        self.width = config.qk_rope_head_dim // 2
        dims = config.qk_rope_head_dim or 2
        self.is_yarn = config.rope_type == "yarn"
        if self.is_yarn:
            self.embedding = YarnRotaryEmbedding(
                dims,
                scaling_factor=config.rotary_scaling_factor,
                original_max_position_embeddings=config.original_max_position_embeddings,
                beta_fast=config.beta_fast,
                beta_slow=config.beta_slow,
                mscale=config.mscale,
                mscale_all_dim=config.mscale_all_dim,
                **common,
            )
        else:
            self.embedding = RotaryEmbedding(dims, rotary_percent=1.0, **common)
        self._last: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None

    @torch.no_grad()
    def cos_sin(self, s: int, offset: int) -> tuple[Tensor, Tensor]:
        """cos and sin `[s, d_r / 2]`, float32, of positions offset .. offset + s - 1, times YaRN's
        concentration factor."""
        if self._last is None or self._last[0] != (s, offset):
            # Evaluation in inference mode must keep tables that training can use later.
            with torch.inference_mode(False):
                # packed_seq keeps Megatron from cutting the table over context-parallel ranks.
                emb, mscale = self.embedding(s, offset=offset, packed_seq=True), 1.0
                if self.is_yarn:
                    emb, mscale = emb
                angle = emb.view(s, -1)[:, : self.width].float()
                self._last = ((s, offset), (angle.cos() * mscale, angle.sin() * mscale))
        return self._last[1]


def rotary_tables(config: MLRAConfig) -> RotaryTables:
    """The tables that all layers with these RoPE constants share."""
    key = tuple(getattr(config, name) for name in _FIELDS)
    if key not in _TABLES:
        _TABLES[key] = RotaryTables(config)
    return _TABLES[key]


_TABLES: dict[tuple, RotaryTables] = {}
