"""Which samples a rank's latest micro-batch holds, so that a bad one can be named."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from torch import Tensor

SOURCE = "source"
"""Key of what a sample is made from: its number in the dataset, its first document and the token in
it, int64 `[3]`."""

_latest: Tensor | None = None


class _WithSource:
    """Samples that say what they are made from."""

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        sample = super().__getitem__(idx)
        place, token = self.sample_index[self.shuffle_index[idx or 0]]
        number = -1 if idx is None else int(idx)
        document = int(self.document_index[place])
        return sample | {SOURCE: torch.tensor([number, document, int(token)])}


class SourcedDataset(_WithSource, GPTDataset):
    """Megatron's GPT dataset with `SOURCE`."""


class SourcedMockDataset(_WithSource, MockGPTDataset):
    """Megatron's mock dataset with `SOURCE`."""


def note(loaded: dict[str, Any]) -> None:
    """Remember a micro-batch as it comes from the loader."""
    global _latest
    _latest = loaded.get(SOURCE)


def latest() -> str:
    """The latest micro-batch in words. Of a tensor-parallel group the first rank loads, and the
    others say so."""
    where = f"data-parallel rank {mpu.get_data_parallel_rank()}"
    if _latest is None:
        return f"{where} (its first tensor-parallel rank names the samples)"
    samples = [
        f"{number} (document {document} from token {token})"
        for number, document, token in _latest.tolist()
    ]
    more = f" and {len(samples) - 4} more" if len(samples) > 4 else ""
    return f"{where}, samples {', '.join(samples[:4])}{more}"
