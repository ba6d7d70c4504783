"""Checkpoints of random weights, for tests of converters and readers."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch

from megatron_mlra.checkpoint.folder import CheckpointFolder
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.tensors import expected_tensors

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "vocab_size": 257,
    "eod_token_id": 256,
    "tokenizer_type": "NullTokenizer",
    "max_position_embeddings": 64,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
}
GQA: dict[str, Any] = {"attention": "gqa", "head_dim": 16}


def latent(num_latent_heads: int, num_branches: int, **changes: Any) -> ModelDescription:
    """A tiny model with latent attention."""
    heads = {"num_latent_heads": num_latent_heads, "num_branches": num_branches}
    return ModelDescription(**{**SIZES, **LATENT, **heads, **changes})


def grouped(num_query_groups: int, **changes: Any) -> ModelDescription:
    """A tiny model with grouped queries."""
    return ModelDescription(**{**SIZES, **GQA, "num_query_groups": num_query_groups, **changes})


class RandomFolder(CheckpointFolder):
    """A checkpoint in memory: random weights of unit gain, norm weights around 1."""

    kind = "random"

    def __init__(self, description: ModelDescription, path: str | Path = "random") -> None:
        self.path = Path(path)
        self.description = description

    def tensor(self, name: str) -> torch.Tensor:
        """See CheckpointFolder; the same numbers at every call."""
        shape = expected_tensors(self.description)[name]
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        tensor = 1 + 0.2 * noise if len(shape) == 1 else noise / math.sqrt(shape[-1])
        return tensor.to(getattr(torch, self.description.dtype))
